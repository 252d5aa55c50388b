"""Mistakes through the command: one sentence, exit code 2, no traceback, nothing half-written."""

import os
import pickle
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import sentences

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "eyecandies.py"
HEIGHT, WIDTH = 24, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two objects with two samples in each split: a box on a belt."""
    root = tmp_path_factory.mktemp("data")
    levels = np.full((HEIGHT, WIDTH), 65535, np.uint16)
    levels[8:16, 8:20] = 0
    rgb = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    for name, split in product(("Confetto", "Lollipop"), ("train", "val", "test_public")):
        data = root / name / split / "data"
        data.mkdir(parents=True)
        for id_ in ("00", "01"):
            Image.fromarray(rgb).save(data / f"{id_}_image_4.png")
            Image.fromarray(levels).save(data / f"{id_}_depth.png")
            Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(data / f"{id_}_mask.png")
            (data / f"{id_}_info_depth.yaml").write_text("normalization: {min: 1.9, max: 2.0}")
            flags = ("anomalous", *(f"anomalous_{kind}" for kind in ("bumps", "dents", "colors", "normals")))
            (data / f"{id_}_metadata.yaml").write_text("\n".join(f"{flag}: 0" for flag in flags))
    return root


def refused(folder, *flags, config=f"{CONFIG}:1-1", workdir="run"):
    """What the command says, without its name, when started in a folder; it must have said that alone."""
    done = subprocess.run(
        [sys.executable, "-m", "iumad_jax.main", f"--config={config}", f"--workdir={workdir}", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    name, _, sentence = done.stderr.partition(": ")
    assert name == "iumad_jax"
    assert sentence.count("\n") == 1
    return sentence.rstrip("\n")


def keys(**values):
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def good(root):
    """What a command needs that goes well."""
    return keys(dataset__root=root, dataset__objects="Confetto,Lollipop", train__batch_size=2)


WRONG_FLAGS = {
    "an unknown key": (["--config.train.epoch=3"], sentences.UNKNOWN_KEY.format(key="epoch", meant="epochs")),
    "an unknown group": (["--config.trian.epochs=3"], sentences.UNKNOWN_KEY.format(key="trian", meant="train")),
    "words for a number": (
        ["--config.train.epochs=many"],
        "flag --config.train.epochs=many: invalid literal for int()",
    ),
    "a fraction for a whole number": (["--config.seed=1.5"], "flag --config.seed=1.5: invalid literal for int()"),
    "words for yes or no": (["--config.model.detach_condition=maybe"], "flag --config.model.detach_condition=maybe:"),
    "a number for a group": (["--config.train=3"], "flag --config.train=3: Failed to parse '3'"),
    "an unknown flag": (["--confg=x"], "Unknown command line flag 'confg'"),
    "something that is no flag": (["more"], sentences.NOT_A_FLAG.format("more")),
    "no such config": (
        ["--config=configs/nowhere.py"],
        sentences.CONFIG_UNREADABLE.format("[Errno 2] No such file or directory"),
    ),
    "no Python": (
        [f"--config={CONFIG.parents[1] / 'LICENSE'}"],
        sentences.CONFIG_UNREADABLE.format("unexpected indent"),
    ),
}


@pytest.mark.parametrize(("flags", "told"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags(tmp_path, flags, told):
    assert refused(tmp_path, *flags).startswith(told)
    assert not list(tmp_path.iterdir())


WRONG_VALUES = {
    "no such root": (keys(dataset__root="nowhere"), sentences.ROOT_NOT_A_FOLDER.format("nowhere")),
    "an empty root": (keys(dataset__root="."), sentences.ROOT_EMPTY.format(".")),
    "no such object": (
        keys(dataset__objects="Candycane"),
        sentences.UNKNOWN_OBJECT.format(name="Candycane", known=""),
    ),
    "a protocol that does not fit": (
        keys(protocol="7-2"),
        sentences.PROTOCOL_DOES_NOT_FIT.format(protocol="7-2", objects=2),
    ),
    "an unknown schedule": (
        keys(train__schedule="linear"),
        sentences.UNKNOWN_SCHEDULE.format(found="linear", known="step, cosine"),
    ),
    "a negative seed": (keys(seed=-1), sentences.SEED_OUT_OF_RANGE.format(found=-1, most=4000000)),
    "heads that do not divide the width": (
        keys(model__heads=3),
        sentences.WIDTH_NOT_DIVISIBLE.format(width=128, heads=3),
    ),
    "a patch larger than the image": (keys(model__patch_size=4000), sentences.PATCH_TOO_LARGE.format(4000)),
    "a baseline that is none": (
        keys(baselines="ib_iumad"),
        sentences.UNKNOWN_BASELINE.format(found="ib_iumad", known="feature_norm,nearest_neighbours"),
    ),
    "heads of iuf that do not divide the width": (
        keys(method="iuf", model__heads=1, model__width=6),
        sentences.WIDTH_NOT_DIVISIBLE_BY_HEADS_OF_IUF.format(6),
    ),
    "a grid that uniad's mask hides": (
        keys(method="uniad", backbone__grid=7),
        sentences.GRID_ALL_MASKED.format(7),
    ),
    "an unknown encoding": (
        keys(input__depth_encoding="foo"),
        sentences.UNKNOWN_ENCODING.format(found="foo", known="normals, height"),
    ),
    "an unknown strategy": (
        keys(continual__strategy="ewc"),
        sentences.UNKNOWN_STRATEGY.format(found="ewc", known="finetune"),
    ),
    "an unknown optimiser": (
        keys(continual__optimizer="lion"),
        sentences.UNKNOWN_OPTIMIZER.format(found="lion", known="adamw, sgd"),
    ),
}


@pytest.mark.parametrize(("flags", "told"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_leave_the_workdir_to_the_corrected_command(root, tmp_path, flags, told):
    sentence = refused(tmp_path, *good(root), *flags)
    assert sentence.startswith(told)
    assert sentence.endswith(".")
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_weights_that_are_a_program(root, tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    sentence = refused(tmp_path, *good(root), *keys(backbone__weights="evil.pth"))
    assert sentence.startswith(sentences.WEIGHTS_REFUSED.format("evil.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_a_workdir_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").touch()
    sentence = refused(tmp_path, *good(root), workdir="file/run")
    assert sentence == sentences.WORKDIR_NOT_WRITABLE.format(folder="file/run", reason="Not a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("mask.png", None, sentences.SAMPLE_FILE_MISSING),
        ("depth.png", b"", sentences.FILE_EMPTY),
        ("image_4.png", 60, sentences.FILE_DAMAGED),
        ("info_depth.yaml", b"!!python/object/apply:os.mkdir ['hacked']", sentences.YAML_REFUSED),
    ],
)
def test_a_bad_file_of_the_dataset(root, tmp_path, name, content, told):
    """The reader's own tests have every kind; here, one or two of those found early and late."""
    file = root / "Confetto" / "train" / "data" / f"01_{name}"
    before = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(before[:content] if isinstance(content, int) else content)
    try:
        sentence = refused(tmp_path, *good(root))
    finally:
        file.write_bytes(before)
    assert sentence.startswith(told.format(file))
    assert not (tmp_path / "hacked").exists()
    assert not list((tmp_path / "run").glob("prepared/*/manifest.json"))
    for kept in ("results.json", "snapshots/0"):
        assert not (tmp_path / "run" / kept).exists()
