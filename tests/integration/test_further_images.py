"""Learned objects that change: further images, other thresholds, missing files, and objects that are retired."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax import Detector, calibrate, history, learn, retire
from iumad_jax.errors import USER_ERROR, UserError
from iumad_jax.inference.thresholds import thresholds
from iumad_jax.runtime import snapshots
from iumad_jax.runtime.ledger import read
from tests import sentences
from tests.integration.test_dataset_changes import files, save_images
from tests.integration.test_learn import add, run, same_snapshots

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
BANK = {"method": "memory_bank", "baselines": "gaussian"}
QUANTILE = 0.995


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
    """Create a run of bolt and nut."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        add("bolt", "nut")
        run(**BANK)
    return home


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process, and return the exit code, standard output and standard error."""

    def run_command(module, *flags):
        arguments = [module.__name__, "--workdir=run", *flags]
        monkeypatch.setattr(sys, "argv", arguments)  # ml_collections reads it
        code = module.main(arguments)
        return code, *capsys.readouterr()

    return run_command


def further(name="bolt", seed=0, count=4, root="objects", split="train/good/rgb"):
    """Add images that are as far from the object's own as those of another seed."""
    save_images(Path(root) / name / split, count, seed, first=50)


def limits(step=None):
    return thresholds(snapshots.read(Path("run"), step).calibration, QUANTILE)


@pytest.mark.usefixtures("home")
def test_further_images_change_their_object_alone(command):
    further()
    code, out, _ = command(learn, "--update", "--objects=bolt")
    assert code == 0
    before, after = (snapshots.read(Path("run"), step) for step in (1, 2))
    for method in ("memory_bank", "gaussian"):
        bolt, nut = zip(before.variables[method]["by_object"], after.variables[method]["by_object"], strict=True)
        jax.tree.map(np.testing.assert_array_equal, *nut)
        assert any(not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, bolt), strict=True))
    assert after.recognition["count"].tolist() == [before.recognition["count"][0] + 4, before.recognition["count"][1]]
    np.testing.assert_array_equal(limits(1).image[1], limits(2).image[1])
    assert after.kept["nut"] == before.kept["nut"]

    plan = json.loads(Path("run/plan.json").read_text())[-1]
    assert (plan["act"], plan["objects"], list(plan["images"]["bolt"]["train"])) == (
        "update", ["bolt"], ["050", "051", "052", "053"]
    )  # fmt: skip
    results = json.loads(Path("run/results.json").read_text())
    was = results["acts"][2]["before"]["bolt"]
    assert was["i_auroc"] == results["matrix"]["i_auroc"][1][0]
    assert out.startswith(f"step 2: updated bolt {was['i_auroc']:.3f} to {results['matrix']['i_auroc'][2][0]:.3f} (")
    code, _, err = command(learn, "--update", "--objects=bolt")
    assert (code, sentences.NO_NEW_IMAGES.format(kind="training", objects="bolt") in err) == (USER_ERROR, True)


@pytest.mark.parametrize("strategy", ["replay", "iuf"])
def test_an_interrupted_update_resumes_to_the_same_result(tmp_path, monkeypatch, command, strategy):
    """The snapshot taken after its training is all that is left of it."""
    monkeypatch.chdir(tmp_path)
    changes = {"method": "uniad", "baselines": "memory_bank", "continual.strategy": strategy}
    add("bolt", "nut")
    run(**changes)
    further()
    assert command(learn, "--update")[0] == 0
    shutil.copytree("run", "whole")
    shutil.rmtree("run/snapshots/2")
    Path("run/results.json").unlink()
    code, _, err = command(learn, "--update")
    assert (code, "updating bolt from 4 images" in err) == (0, True)
    assert Path("run/ledger.jsonl").read_bytes() == Path("whole/ledger.jsonl").read_bytes()
    same_snapshots("run", "whole", 2)


@pytest.mark.usefixtures("home")
def test_an_unfinished_update_is_finished_as_it_began(command):
    """Its results are missing first, then also its snapshot, and last one of its images."""
    before = Path("run/results.json").read_bytes()
    further()
    assert command(learn, "--update")[0] == 0
    after = files(Path("run"))
    Path("run/results.json").write_bytes(before)
    assert command(learn, "--update")[0] == 0
    assert files(Path("run")) == after

    Path("run/results.json").write_bytes(before)
    shutil.rmtree("run/snapshots/2")
    code, _, err = command(learn, "--update", "--config.train.epochs=7")
    assert (code, "has begun to update bolt without changed keys; finish it so first" in err) == (USER_ERROR, True)
    Path("objects/bolt/train/good/rgb/051.png").unlink()
    code, _, err = command(learn, "--update")
    assert (code, "1 of its new images are missing or changed (051)" in err) == (USER_ERROR, True)


@pytest.mark.usefixtures("home")
def test_objects_whose_files_are_gone_are_still_judged(command):
    """The thresholds of bolt are those of a run that still has its files, and its results those of its last test."""
    add("washer")
    shutil.copytree("objects", "whole")
    shutil.rmtree("objects/bolt")
    assert command(learn)[0] == 0
    without = limits()
    results = json.loads(Path("run/results.json").read_text())
    events = [event for event in read(Path("run/ledger.jsonl")) if event["event"] == "evaluation"]
    tested = [event["object"] for event in events if event["step"] == 2]
    assert set(tested) == {"nut", "washer"}
    assert results["tested"] == {"bolt": 1}
    assert results["matrix"]["aupro"][2][0] == results["matrix"]["aupro"][1][0]
    assert re.search(r"\| bolt\s+\|\s+0 \(tested after 1\) \|", Path("run/results.md").read_text())
    shutil.rmtree("run/snapshots/2")
    shutil.rmtree("run/snapshots_within_step", ignore_errors=True)
    Path("run/results.json").unlink()
    shutil.rmtree("objects")
    shutil.move("whole", "objects")
    assert command(learn)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, without, limits())

    shutil.rmtree("objects")
    assert command(retire, "--objects=bolt")[0] == 0
    assert Detector.load("run").retired == ("bolt",)


@pytest.mark.usefixtures("home")
def test_a_false_alarm_that_a_person_calls_good_raises_the_threshold(command):
    detector = Detector.load("run")
    further(seed=7, count=1, root="called_good")
    with Image.open("called_good/bolt/train/good/rgb/050.png") as image:
        pixels = np.asarray(image)
    before = detector(pixels, object="bolt")
    assert before.anomalous
    weights = snapshots.read(Path("run")).variables
    code, out, _ = command(calibrate, "--objects=bolt", "--config.dataset.root=called_good")
    assert (code, out.startswith("step 2: calibrated bolt")) == (0, True)
    detector = detector.refresh()
    after = detector(pixels, object="bolt")
    assert not after.anomalous
    assert after.image_threshold == pytest.approx(1.0001 * after.score, rel=2e-5)
    jax.tree.map(np.testing.assert_array_equal, weights, snapshots.read(Path("run")).variables)
    np.testing.assert_array_equal(limits(1).image[1], limits(2).image[1])


@pytest.mark.usefixtures("home")
def test_a_retired_object_is_no_longer_recognised_and_its_results_stay(command):
    with Image.open("objects/bolt/test/good/rgb/100.png") as image:
        pixels = np.asarray(image)
    assert Detector.load("run")(pixels).object == "bolt"
    assert command(retire, "--objects=bolt")[0] == 0
    detector = Detector.load("run")
    assert detector(pixels).object == "nut"
    with pytest.raises(UserError, match=sentences.OBJECT_RETIRED.format("bolt")):
        detector(pixels, object="bolt")
    add("washer")
    assert command(learn)[0] == 0
    results = json.loads(Path("run/results.json").read_text())
    assert results["matrix"]["i_auroc"][3][0] == results["matrix"]["i_auroc"][1][0]
    assert re.search(r"\| bolt\s+\|\s+0 \(retired, tested after 1\) \|", Path("run/results.md").read_text())
    later = snapshots.read(Path("run")).calibration
    assert [later[name].retired for name in ("bolt", "nut", "washer")] == [True, False, False]


@pytest.mark.usefixtures("home")
def test_a_retired_object_comes_back_as_it_was(command, capsys):
    """The gaussian baseline and the bank are independent of other objects, of which one was learned meanwhile."""
    with Image.open("objects/bolt/test/good/rgb/100.png") as image:
        pixels = np.asarray(image)
    before, calibration = Detector.load("run")(pixels), snapshots.read(Path("run")).calibration["bolt"]
    assert command(retire, "--objects=bolt")[0] == 0
    add("washer")
    assert command(learn)[0] == 0
    code, out, _ = command(retire, "--objects=bolt", "--undo")
    results = json.loads(Path("run/results.json").read_text())
    assert (code, results["acts"][4]["act"]) == (0, "restore")
    assert out.startswith(f"step 4: restored bolt {results['matrix']['i_auroc'][4][0]:.3f}; mean of all")
    assert results["matrix"]["i_auroc"][4][0] == results["matrix"]["i_auroc"][1][0]
    assert re.search(r"\| bolt\s+\|\s+0 \|", Path("run/results.md").read_text())
    after, detector = Detector.load("run")(pixels), Detector.load("run")
    assert (detector.retired, after.object, after.score) == ((), "bolt", before.score)
    assert after.image_threshold == before.image_threshold
    assert snapshots.read(Path("run")).calibration["bolt"].score.tolist() == calibration.score.tolist()
    assert history.main(["history", "--workdir=run"]) == 0
    assert "restored bolt" in capsys.readouterr().out
    code, _, err = command(retire, "--objects=bolt", "--undo")
    assert (code, '"bolt" is not retired; no object is.' in err) == (USER_ERROR, True)


@pytest.mark.usefixtures("home")
def test_an_object_updated_from_another_folder_is_tested_there(command):
    results = Path("run/results.md").read_bytes()
    further(root="new_lamp", seed=0)
    further(root="new_lamp", seed=0, count=2, split="test/good/rgb")
    further(root="new_lamp", seed=9, count=3, split="test/hole/rgb")
    assert command(learn, "--update", "--config.dataset.root=new_lamp")[0] == 0
    events = [event for event in read(Path("run/ledger.jsonl")) if event.get("step") == 2]
    (before,) = (event for event in events if event["event"] == "before")
    images = {event["object"]: event for event in events if event["event"] == "evaluation"}
    assert (before["object"], set(images)) == ("bolt", {"bolt", "nut"})
    samples = np.load("run/samples/step2_bolt.npz", allow_pickle=False)
    assert len(samples["ids"]) == 5
    run(**BANK)  # its own dataset has no new images
    assert command(learn, "--after=1", "--output=undone")[0] == 0  # nor any change of its test images
    assert (Path("undone/results.md").read_bytes(), Path("undone/report.html").exists()) == (results, True)
    further(seed=3)
    with pytest.raises(
        UserError, match=re.escape(sentences.NEW_IMAGES.format(command="learn --update", objects="bolt"))
    ):
        run(**BANK)


@pytest.mark.usefixtures("home")
def test_copies_of_training_images_set_no_thresholds(command):
    """Whatever their names; thresholds would be too low."""
    validation = Path("objects/bolt/val/good/rgb")
    validation.mkdir(parents=True, exist_ok=True)
    for image in sorted(Path("objects/bolt/train/good/rgb").iterdir())[:2]:
        shutil.copy(image, validation / f"copy_{image.name}")
    code, _, err = command(calibrate, "--objects=bolt")
    assert (code, sentences.NO_NEW_IMAGES.format(kind="good", objects="bolt") in err) == (USER_ERROR, True)
    further(split="val/good/rgb", count=3)
    assert command(calibrate, "--objects=bolt")[0] == USER_ERROR  # the copies are still ignored
    assert snapshots.read(Path("run")).position.step == 2
    (step,) = (event for event in read(Path("run/ledger.jsonl")) if event["event"] == "step" and event["step"] == 2)
    assert step["images"] == 3


@pytest.mark.usefixtures("home")
def test_an_undone_update_can_be_learned_again(command):
    further()
    assert command(learn, "--update")[0] == 0
    assert command(learn, "--after=1", "--output=undone")[0] == USER_ERROR  # its dataset has images that it ignores
    shutil.move("run", "later")
    shutil.move("undone", "run")
    assert command(learn, "--update")[0] == 0
    same_snapshots("run", "later", 2)


REFUSED = {
    "an unknown object": (learn, ("--update", "--objects=screw"), 'the run has not learned "screw"'),
    "no new images": (learn, ("--update",), "has no training images of"),
    "nothing to calibrate with": (calibrate, (), "has no good images of"),
    "the images of another object": (learn, ("--update", "--config.dataset.root=mixed"), "are taken for nut"),
    "no objects to retire": (retire, (), "--objects is missing"),
    "all objects retired": (retire, ("--objects=bolt,nut",), "would retire every object"),
}


@pytest.mark.parametrize(("module", "flags", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("home")
def test_a_mistake_is_told_and_changes_nothing(command, module, flags, message):
    further(root="mixed", seed=2)  # those of nut
    before = files(Path("run"))
    code, _, err = command(module, *flags)
    assert (code, message in err) == (USER_ERROR, True)
    after = files(Path("run"))
    assert {path for path in after if "prepared" not in path.parts} == {p for p in before if "prepared" not in p.parts}
    assert all(after[path] == content for path, content in before.items())


def test_a_strategy_that_keeps_all_images_refuses_further_ones(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    add("bolt")
    run(method="uniad", baselines="", **{"continual.strategy": "joint"})
    further()
    code, _, err = command(learn, "--update")
    assert (code, "strategy is joint" in err) == (USER_ERROR, True)
