"""Objects that come after a run is finished."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from iumad_jax import Detector, experiment, history, learn
from iumad_jax.config import small
from iumad_jax.data import plan
from iumad_jax.errors import USER_ERROR, UserError
from iumad_jax.runtime import snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.ledger import read
from tests import sentences
from tests.integration.test_dataset_changes import KEYS as FOLDER_KEYS
from tests.integration.test_dataset_changes import add_object, files, save_images

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
KEYS = FOLDER_KEYS | {"baselines": "gaussian,memory_bank", "train.epochs": 1, "report.pictures_per_object": 0}


def run(workdir="run", protocol="open", **changes):
    config = small(protocol)
    config.update_from_flattened_dict(KEYS | changes)
    return experiment.run(config, Path(workdir))


@pytest.fixture
def command(monkeypatch, capsys):
    """Learn in this process, and return the exit code, standard output and standard error."""

    def run_command(*flags):
        monkeypatch.setattr(sys, "argv", arguments := ["learn", "--workdir=run", *flags])  # ml_collections reads it
        code = learn.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def add(*names, root="objects"):
    for name in names:
        add_object(Path(root), name, seed=("anchor", "bolt", "nut", "washer").index(name))


def same_snapshots(first, second, step):
    """Compare all arrays and thresholds of two runs after a step, bit for bit."""
    one, other = (snapshots.read(Path(workdir), step) for workdir in (first, second))
    for field in ("variables", "strategy_state", "recognition", "scales", "calibration"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, field), getattr(other, field))
    assert (one.objects, one.inputs) == (other.objects, other.inputs)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a folder of prepared images, which are the same for all methods."""
    return tmp_path_factory.mktemp("prepared")


@pytest.mark.parametrize(
    ("method", "strategy", "baselines"),
    [
        ("ib_iumad", "replay", ""),
        ("uniad", "finetune", "gaussian,memory_bank"),
        ("iuf", "iuf", ""),
        ("destseg", "finetune", ""),
        ("cdad", "isvd", ""),
    ],
)
def test_an_object_that_comes_later_is_learned_as_if_it_had_been_there(
    tmp_path, monkeypatch, prepared, method, strategy, baselines
):
    monkeypatch.chdir(tmp_path)
    changes = {"method": method, "continual.strategy": strategy, "baselines": baselines}
    add("bolt", "nut")
    growing = changes | {"dataset.prepared": str(prepared / "growing")}
    run(**growing)
    add("washer")
    later = run(**growing)
    at_once = run("at_once", **changes, **{"dataset.prepared": str(prepared / "at_once")})
    assert Path("run/ledger.jsonl").read_bytes() == Path("at_once/ledger.jsonl").read_bytes()
    assert later["steps"] == at_once["steps"] == [["bolt"], ["nut"], ["washer"]]
    for step in range(3):
        same_snapshots("run", "at_once", step)


def test_runs_of_the_same_settings_share_programs(tmp_path, monkeypatch, caplog):
    """A change of the seed keeps the programs of the first run, another width does not."""
    monkeypatch.chdir(tmp_path)
    add("bolt")
    names = {"init", "predict", "_fun"}  # the last is an update over all devices
    for workdir, changes, expected in (("a", {}, names), ("b", {"seed": 1}, set()), ("c", {"model.width": 12}, names)):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            run(workdir, method="uniad", baselines="", **changes)
        assert names & set(re.findall(r"Compiling jit\((\w+)\)", caplog.text)) == expected


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
    """Create a closed run of bolt and nut, and the images of washer in another folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        add("bolt", "nut")
        run(protocol="2-0", method="memory_bank", baselines="")
        add("washer", root="later")
    return home


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")


@pytest.mark.usefixtures("home")
def test_a_closed_run_learns_objects_from_another_folder(command):
    add("anchor")
    before = files(Path("run/snapshots/0"))
    code, out, _ = command("--config.dataset.root=later", "--config.train.epochs=3")
    assert (code, command()[0]) == (0, 0)  # the second learns all of the run's own dataset: anchor
    matrix = np.array(json.loads(Path("run/results.json").read_text())["matrix"]["i_auroc"], float)
    changes = matrix[1, :2] - matrix[0, :2]
    largest = int(np.argmax(np.abs(changes)))
    assert out.splitlines()[0] == sentences.STEP_EVALUATED_WITH_OTHERS.format(
        step=1,
        learned=f"washer {matrix[1, 2]:.3f}",
        change=f"{('bolt', 'nut')[largest]} {changes[largest]:+.3f}",
        mean=f"{matrix[1, :3].mean():.3f}",
    )
    steps = [event for event in read(Path("run/ledger.jsonl")) if event["event"] == "step"]
    assert [step["objects"] for step in steps] == [["bolt", "nut"], ["washer"], ["anchor"]]
    assert [step["changes"] for step in steps] == [{}, {"dataset.root": "later", "train.epochs": 3}, {}]
    assert files(Path("run/snapshots/0")) == before
    detector = Detector.load("run")
    assert detector.objects == ("bolt", "nut", "washer", "anchor")
    for name, root in (("bolt", "objects"), ("washer", "later"), ("anchor", "objects")):
        assert recognised(detector, Path(root) / name) == name
    config = workdirs.read(Path("run"))
    reader = plan.open_for_use(config, Path("run"), detector.step)  # as `evaluate` does
    assert (sorted(reader.objects), reader.ids("washer", "test")) == (sorted(detector.objects), ids_of("later/washer"))
    config.dataset.root = "later"
    assert plan.open_for_use(config, Path("run"), detector.step).objects == ("washer",)


def ids_of(folder):
    return tuple(f"{file.parts[-3]}/{file.stem}" for file in sorted(Path(folder).glob("test/*/rgb/*.png")))


def recognised(detector, folder):
    from PIL import Image

    with Image.open(folder / "train/good/rgb/000.png") as image:
        return str(detector(np.asarray(image.convert("RGB"))).object)


@pytest.mark.usefixtures("home")
def test_learning_an_object_changes_nothing_of_the_others_bank(command):
    before = snapshots.read(Path("run")).variables["memory_bank"]["by_object"]
    assert command("--config.dataset.root=later")[0] == 0
    after = snapshots.read(Path("run")).variables["memory_bank"]["by_object"]
    jax.tree.map(np.testing.assert_array_equal, before, after[:2])
    assert len(after) == 3


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], sentences.OBJECTS_LEARNED_ALREADY.format(objects="bolt, nut", root="objects")),
        (["--objects=nut"], sentences.OBJECTS_LEARNED_ALREADY.format(objects="nut", root="objects")),
        (["--objects=screw"], 'iumad_jax: --objects names "screw"; choose all or any of bolt, nut.'),
        (["--objects=nut,nut"], "iumad_jax: --objects names nut twice"),
        (["--config.dataset.root=nowhere"], "config.dataset.root is nowhere, which is not a folder"),
        (["--config.model.width=16"], "--config.model.width is fixed by training"),
        (["--config.train.epochs=-1"], "config.train.epochs is -1; use 0 to"),
        (["--config.dataset.root=later", "--config.train.optimizer=sgd"], "config.train.optimizer cannot be changed"),
        (["--config.dataset.objects=washer"], "config.dataset.objects cannot be changed here; use --objects"),
        (["--output=copy"], "--output is the folder of the copy"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(command, flags, sentence):
    before = files(Path("run"))
    code, _, err = command(*flags)
    assert code == USER_ERROR
    assert sentence in err
    assert files(Path("run")) == before


def test_a_relative_dataset_is_looked_for_in_the_current_folder(home, command, monkeypatch):
    """So a run and its dataset can be moved together; the message names the folder."""
    add("anchor")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, _, err = command("--workdir=../run")
    assert (code, err.splitlines()[-1]) == (
        USER_ERROR,
        f"iumad_jax: config.dataset.root is objects, which is not a folder in {Path.cwd()}; choose the dataset's folder"
        " with --config.dataset.root.",
    )
    code, _, err = command(
        "--workdir=../run", f"--config.dataset.root={Path('../objects').resolve()}", "--objects=anchor"
    )
    assert (code, Detector.load("../run").objects) == (0, ("bolt", "nut", "anchor"))


def test_a_process_killed_while_learning_resumes_to_the_same_result(tmp_path, monkeypatch):
    """It is killed after the added step has begun, and again after its training."""
    monkeypatch.chdir(tmp_path)
    add("bolt")
    run(method="uniad", baselines="")
    shutil.copytree("run", "other")
    add("nut", root="later")
    command = [sys.executable, "-m", "iumad_jax.learn", "--config.dataset.root=later", "--config.train.epochs=3"]
    ledger = Path("run/ledger.jsonl")
    before = len(ledger.read_bytes().splitlines())
    for events in (1, 4):
        process = subprocess.Popen([*command, "--workdir=run"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(ledger.read_bytes().splitlines()) < before + events:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    for workdir in ("run", "other"):
        out = subprocess.run([*command, f"--workdir={workdir}"], check=True, capture_output=True).stdout
        assert b"step 1: learned nut" in out
    assert ledger.read_bytes() == Path("other/ledger.jsonl").read_bytes()
    same_snapshots("run", "other", 1)


def test_a_step_that_was_trained_but_not_evaluated_resumes_to_the_same_result(tmp_path, monkeypatch):
    """The snapshot taken after its training knows the new object, whose thresholds are not set yet."""
    monkeypatch.chdir(tmp_path)
    add("bolt", "nut")
    run(method="uniad")
    shutil.copytree("run", "resumed")
    shutil.rmtree("resumed/snapshots/1")
    Path("resumed/results.json").unlink()
    run("resumed", method="uniad")
    assert Path("resumed/ledger.jsonl").read_bytes() == Path("run/ledger.jsonl").read_bytes()
    same_snapshots("resumed", "run", 1)


@pytest.mark.usefixtures("home")
def test_a_begun_step_is_finished_as_it_began(command):
    plan = json.loads(Path("run/plan.json").read_text())
    changes = {"dataset.root": "later", "train.epochs": 3}
    begun = {"act": "learn", "objects": ["washer"], "changes": changes, "images": {}}
    Path("run/plan.json").write_text(json.dumps([*plan, begun]))
    code, _, err = command("--config.dataset.root=later")
    assert code == USER_ERROR
    keys = "--config.dataset.root=later --config.train.epochs=3"
    assert sentences.STEP_BEGUN_OTHERWISE.format(object="washer", keys=keys) in err
    assert command(*keys.split())[0] == 0
    assert json.loads(Path("run/results.json").read_text())["steps"] == [["bolt", "nut"], ["washer"]]


def test_a_withdrawn_object_is_forgotten_until_its_step_begins(tmp_path, monkeypatch):
    """Its only image cannot be decoded, so its step does not begin."""
    monkeypatch.chdir(tmp_path)
    changes = {"method": "memory_bank", "baselines": ""}
    add("bolt")
    run(**changes)
    bad = Path("objects/anchor/train/good/rgb/000.png")
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000\.png"):
        run(**changes)
    shutil.rmtree("objects/anchor")
    add("nut")
    assert run(**changes)["steps"] == [["bolt"], ["nut"]]


@pytest.mark.usefixtures("home")
def test_an_object_that_looks_like_a_learned_one_is_told(command):
    """The first has further images of bolt, the second is a new object."""
    for name, seed, first in (("screw", 1, 50), ("anchor", 0, 0)):
        save_images(Path(name) / name / "train/good/rgb", 6, seed, first)
        code, _, err = command(f"--config.dataset.root={name}")
        assert code == 0
        expected = sentences.OBJECT_LOOKS_LIKE.format(new=name, old="bolt", share="100%")
        assert (expected in err) == (name == "screw")
        assert (sentences.OBJECT_LOOKS_LIKE.split("{old}")[0].format(new=name) in err) == (name == "screw")


def test_objects_learned_without_training_are_rehearsed_by_their_own_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add("bolt", "nut")
    run(method="uniad", baselines="", **{"train.epochs": 0})
    run("trained", method="uniad", baselines="")
    gaussians = [snapshots.read(Path(workdir)).strategy_state["by_object"] for workdir in ("run", "trained")]
    assert len(gaussians[0]) == 2
    jax.tree.map(np.testing.assert_array_equal, *gaussians)


@pytest.mark.usefixtures("home")
def test_undoing_a_step_leaves_the_run_as_it_was_before(command):
    """The copy goes on with another object as the run would have done."""
    assert command("--config.dataset.root=later")[0] == 0
    add("anchor")
    later = files(Path("run"))
    code, out, _ = command("--after=0", "--output=undone", "--objects=anchor")
    assert code == 0
    assert out.splitlines()[0].startswith("step 1: learned anchor")
    assert files(Path("run")) == later
    run("expected", protocol="2-0", method="memory_bank", baselines="", **{"dataset.objects": "bolt,nut"})
    assert json.loads(Path("undone/results.json").read_text())["steps"] == [["bolt", "nut"], ["anchor"]]
    same_snapshots("undone", "expected", 0)
    assert Detector.load("undone").objects == ("bolt", "nut", "anchor")
    code, _, err = command("--after=0", "--output=undone")
    assert code == USER_ERROR
    assert "undone exists" in err
    code, _, err = command("--after=7", "--output=other")
    assert code == USER_ERROR
    assert not Path("other").exists()


@pytest.mark.usefixtures("home")
def test_the_history_tells_what_each_step_did(command, capsys):
    keys = ["--config.dataset.root=later", "--config.train.epochs=3"]
    assert command(*keys)[0] == 0
    assert history.main(["history", "--workdir=run"]) == 0
    _, _, first, second = (line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines())
    matrix = json.loads(Path("run/results.json").read_text())["matrix"]["i_auroc"]
    learned = f"learned bolt {matrix[0][0]:.3f}, nut {matrix[0][1]:.3f}"
    assert [cell.strip() for cell in (first[0], *first[2:4])] == ["0", "12", learned]
    assert [cell.strip() for cell in (*second[2:4], second[-1])] == [
        "6",
        f"learned washer {matrix[1][2]:.3f}",
        "dataset.root=later train.epochs=3",
    ]
