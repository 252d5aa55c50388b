"""Runs whose dataset changes before, during or after training."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax import Detector, experiment
from iumad_jax.config import small
from iumad_jax.errors import UserError
from iumad_jax.report.history import history
from iumad_jax.runtime.ledger import read
from tests import sentences
from tests.integration.conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
KEYS = SMALL | {
    "dataset.name": "folder",
    "dataset.root": "objects",
    "modality": "rgb",
    "method": "uniad",
    "baselines": "",
    "continual.replay.rank": 2,
    "continual.replay.image_size": 8,
}


def save_images(folder, count, seed=0, first=0):
    """Save images of stripes, whose width depends on the object, and of noise, which differs between images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, first])
    for number in range(first, first + count):
        stripes = 100 + 60 * (np.arange(64) // (2 + 3 * seed) % 2)
        pixels = stripes[None, :, None] + rng.normal(0, 8, (64, 64, 3))
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")


def add_object(root, name, seed, count=6):
    save_images(root / name / "train" / "good" / "rgb", count, seed)
    save_images(root / name / "test" / "good" / "rgb", 2, seed, first=100)
    save_images(root / name / "test" / "hole" / "rgb", 2, seed + 5, first=200)


def run(**changes):
    config = small("1-1")
    config.update_from_flattened_dict(KEYS | changes)
    return experiment.run(config, Path("run"))


def exchange(first, second):
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
    """Create a dataset of bolts and nuts, and a finished run."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("bolt", "nut")):
        add_object(home / "objects", name, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run()
    return home


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    """Copy the dataset and the run, which the test may change."""
    for name in ("objects", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_after_step(step, within=False):
    """Remove what the run wrote after this step, or with `within` after the training of the next step."""
    Path("run/results.json").unlink()
    for folder in Path("run/snapshots").glob("[0-9]*"):
        if int(folder.name) > step:
            shutil.rmtree(folder)
    if not within:
        shutil.rmtree("run/snapshots_within_step")


def test_a_finished_run_reports_new_objects(home):
    before = files(home / "run")
    add_object(home / "objects", "washer", 2)
    with pytest.raises(experiment.DatasetChanged) as error:
        run()
    assert str(error.value) == (f"{sentences.DATASET_CHANGED.format('run')} {sentences.OBJECTS_NEW.format('washer')}")
    assert error.value.results == json.loads(before[home / "run/results.json"])
    assert files(home / "run") == before


def test_a_finished_run_reports_changed_images(home):
    before = files(home / "run")
    save_images(home / "objects/bolt/train/good/rgb", 7, seed=0, first=50)
    save_images(home / "objects/nut/val/good/rgb", 1, seed=1, first=70)
    save_images(home / "objects/nut/test/hole/rgb", 1, seed=9, first=200)  # replaces the first test image
    (home / "objects/nut/train/good/rgb/003.png").unlink()
    with pytest.raises(experiment.DatasetChanged) as error:
        run()
    added = sentences.NAMES_AND_MORE.format(shown="050, 051, 052, 053, 054", count=2)
    changed = [
        sentences.IMAGES_ADDED.format(object="bolt", split="training", count=7, which=added),
        sentences.IMAGES_REMOVED.format(object="nut", split="training", count=1, which="003"),
        sentences.IMAGES_ADDED.format(object="nut", split="validation", count=1, which="070"),
        sentences.IMAGES_CHANGED.format(object="nut", split="test", count=1, which="hole/200"),
    ]
    messages = [sentences.DATASET_CHANGED.format("run"), *map(sentences.CHANGED_SINCE_USE.format, changed)]
    messages.append(sentences.NEW_IMAGES.format(command="learn --update", objects="bolt"))
    messages.append(sentences.NEW_IMAGES.format(command="calibrate", objects="nut"))  # it has no new training images
    messages.append(sentences.TEST_IMAGES_CHANGED)
    assert str(error.value) == " ".join(messages)
    assert files(home / "run") == before


def test_other_file_times_are_not_a_change(home, capsys):
    for path in (home / "objects").rglob("*.png"):
        os.utime(path, (1, 1))
    run()
    assert capsys.readouterr().out == f"{sentences.RUN_FINISHED.format('run')}\n"


def test_a_finished_run_stays_finished_without_its_dataset(home, capsys):
    (home / "objects").rename(home / "elsewhere")
    assert run() == json.loads((home / "run/results.json").read_text())
    out, err = capsys.readouterr()
    assert out == f"{sentences.RUN_FINISHED.format('run')}\n"
    assert err == f"run: {sentences.DATASET_MISSING.format('objects')}\n"


def test_a_resumed_run_learns_its_original_objects(home, finished, capsys):
    """The new object comes first in the alphabet, so that a new run would learn it first."""
    stop_after_step(0)
    add_object(home / "objects", "anchor", 2)
    with pytest.raises(experiment.DatasetChanged, match=sentences.OBJECTS_NEW_PART.format("anchor")):
        run()
    assert (home / "run/ledger.jsonl").read_bytes() == (finished / "run/ledger.jsonl").read_bytes()
    assert (home / "run/results.md").read_bytes() == (finished / "run/results.md").read_bytes()
    assert Detector.load("run").objects == ("bolt", "nut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "bolt").rename(root / "screw"),
            sentences.OBJECT_RENAMED.format(known="bolt", found="screw"),
        ),
        (
            lambda root: exchange(root / "bolt", root / "nut"),
            sentences.OBJECT_NAMES_EXCHANGED.format(object="nut", other="bolt"),
        ),
        (lambda root: shutil.rmtree(root / "nut"), sentences.OBJECT_MISSING.format("nut")),
    ],
)
def test_a_run_with_a_renamed_or_removed_object_is_not_resumed(home, change, message):
    stop_after_step(0)
    before = files(home / "run")
    change(home / "objects")
    with pytest.raises(UserError, match=message):
        run()
    assert files(home / "run") == before


def test_an_interrupted_step_is_not_resumed_with_other_images(home):
    stop_after_step(0, within=True)
    before = files(home / "run")
    for number in (1, 4):
        (home / f"objects/nut/train/good/rgb/{number:03}.png").unlink()
    with pytest.raises(UserError) as error:
        run()
    assert str(error.value) == (
        sentences.CHANGED_WITHIN_STEP.format(
            changed=sentences.IMAGES_REMOVED.format(object="nut", split="training", count=2, which="001, 004"),
            step=1,
            folder="run/snapshots_within_step",
        )
    )
    assert files(home / "run") == before
    shutil.rmtree(home / "run/snapshots_within_step")
    run()
    assert [event["images"] for event in read(home / "run/ledger.jsonl") if event["event"] == "step"] == [6, 4]


def test_changed_images_of_a_learned_object_are_reported(home, capsys):
    stop_after_step(0)
    save_images(home / "objects/bolt/train/good/rgb", 1, seed=0, first=50)
    save_images(home / "objects/bolt/val/good/rgb", 2, seed=0, first=70)
    added = sentences.IMAGES_ADDED.format(object="bolt", split="training", count=1, which="050")
    with pytest.raises(experiment.DatasetChanged, match=re.escape(sentences.CHANGED_SINCE_USE.format(added))) as error:
        run()
    assert str(error.value).endswith(sentences.NEW_IMAGES.format(command="learn --update", objects="bolt"))
    messages = capsys.readouterr().err.splitlines()
    assert messages[:2] == [
        sentences.EARLIER_IMAGES_LEARNED.format(
            sentences.IMAGES_ADDED.format(object="bolt", split="training", count=1, which="050")
        ),
        sentences.EARLIER_IMAGES_LEARNED.format(
            sentences.IMAGES_ADDED.format(object="bolt", split="validation", count=2, which="070, 071")
        ),
    ]
    decisions = history(read(home / "run/ledger.jsonl")).decisions
    calibrated = [step["objects"]["bolt"]["image"]["images"] for step in decisions]
    assert calibrated == [6 + 20, 6 + 20]  # training images and worse copies, which the run keeps


def test_images_of_a_learned_object_that_are_still_needed_may_not_change(home):
    shutil.rmtree(home / "run")
    joint = {"continual.strategy": "joint", "method": "memory_bank"}
    run(**joint)
    stop_after_step(0)
    before = files(home / "run")
    save_images(home / "objects/bolt/train/good/rgb", 1, seed=0, first=50)
    with pytest.raises(UserError) as error:
        run(**joint)
    assert str(error.value) == (
        sentences.LATER_STEPS_NEED_IMAGES.format(
            sentences.IMAGES_ADDED.format(object="bolt", split="training", count=1, which="050")
        )
    )
    assert files(home / "run") == before


def test_a_finished_run_reports_renamed_objects(home):
    """One object renamed beside a new empty folder; both objects renamed; their names exchanged."""
    (home / "objects/bolt").rename(home / "objects/screw")
    (home / "objects/half").mkdir()
    with pytest.raises(experiment.DatasetChanged) as error:
        run()
    renamed = sentences.OBJECT_RENAMED.format(known="bolt", found="screw")
    assert str(error.value) == " ".join(
        [sentences.DATASET_CHANGED.format("run"), renamed, sentences.OBJECTS_NEW.format("half")]
    )
    (home / "objects/half").rmdir()
    (home / "objects/nut").rename(home / "objects/mother")
    names = {"bolt": "screw", "nut": "mother"}
    messages = (sentences.OBJECT_RENAMED_PART.format(known=known, found=found) for known, found in names.items())
    with pytest.raises(experiment.DatasetChanged, match=".* ".join(messages)):
        run()
    (home / "objects/screw").rename(home / "objects/nut")
    (home / "objects/mother").rename(home / "objects/bolt")
    exchanged = (("bolt", "nut"), ("nut", "bolt"))
    messages = (sentences.OBJECT_HOLDS_IMAGES_OF_ANOTHER.format(object=name, other=other) for name, other in exchanged)
    with pytest.raises(experiment.DatasetChanged, match="; .* ".join(messages)):
        run()


def test_without_a_plan_the_objects_of_the_snapshot_are_required(home):
    stop_after_step(0)
    (home / "run/plan.json").unlink()
    add_object(home / "objects", "anchor", 2)
    ledger = (home / "run/ledger.jsonl").read_bytes()
    with pytest.raises(UserError, match=sentences.PLAN_DIFFERS.format(learned="bolt", planned="anchor, bolt, nut")):
        run()
    assert (home / "run/ledger.jsonl").read_bytes() == ledger


def test_a_damaged_inventory_is_refused(home):
    for content in (b"", b"[]", b'{"bolt": 3}', b"\xff", b'{"bolt": {"train": {"000": [1]}}}'):
        (home / "run/dataset.json").write_bytes(content)
        with pytest.raises(UserError, match=sentences.INVENTORY_DAMAGED.format(r"run/dataset\.json")):
            run()
