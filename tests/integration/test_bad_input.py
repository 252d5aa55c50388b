"""Mistakes in a command: one sentence, exit code 2, no traceback, no incomplete files."""

import io
import os
import pickle
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax.main import main
from tests import sentences

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # of ml_collections
]

CONFIG = Path(__file__).parents[2] / "configs" / "eyecandies.py"
HEIGHT, WIDTH = 24, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Create a dataset of two objects with two samples per split, which show a box on a belt."""
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
    """Run the command in a folder and return its error sentence; it must print nothing else and exit with code 2."""
    arguments = ["main", f"--config={config}", f"--workdir={workdir}", *flags]
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.chdir(folder)
        patch.setattr("sys.argv", arguments)  # ml_collections reads it
        code = main(arguments)
    assert (code, out.getvalue()) == (2, ""), error.getvalue()
    name, _, sentence = error.getvalue().partition(": ")
    assert name == "iumad_jax"
    assert sentence.count("\n") == 1
    return sentence.rstrip("\n")


def keys(**values):
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def valid_flags(root):
    """Return the flags of a command that succeeds."""
    return keys(dataset__root=root, dataset__objects="Confetto,Lollipop", train__batch_size=2)


WRONG_FLAGS = {
    "an unknown key": (["--config.train.epoch=3"], sentences.UNKNOWN_KEY.format(key="epoch", meant="epochs")),
    "an unknown group": (["--config.trian.epochs=3"], sentences.UNKNOWN_KEY.format(key="trian", meant="train")),
    "a word instead of a number": (
        ["--config.train.epochs=many"],
        "flag --config.train.epochs=many: invalid literal for int()",
    ),
    "a fraction instead of a whole number": (
        ["--config.seed=1.5"],
        "flag --config.seed=1.5: invalid literal for int()",
    ),
    "a word instead of true or false": (
        ["--config.model.detach_condition=maybe"],
        "flag --config.model.detach_condition=maybe:",
    ),
    "a number instead of a group": (["--config.train=3"], "flag --config.train=3: Failed to parse '3'"),
    "an unknown flag": (["--confg=x"], "Unknown command line flag 'confg'"),
    "an argument that is not a flag": (["more"], sentences.NOT_A_FLAG.format("more")),
    "a missing config file": (
        ["--config=configs/nowhere.py"],
        sentences.CONFIG_UNKNOWN.format("configs/nowhere.py"),
    ),
    "a config file that is not Python": (
        [f"--config={CONFIG.parents[1] / 'LICENSE'}"],
        sentences.CONFIG_UNREADABLE.format("unexpected indent"),
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags_are_refused(tmp_path, flags, sentence):
    assert refused(tmp_path, *flags).startswith(sentence)
    assert not list(tmp_path.iterdir())


WRONG_VALUES = {
    "a missing root": (keys(dataset__root="nowhere"), sentences.ROOT_NOT_A_FOLDER.format("nowhere")),
    "an empty root": (keys(dataset__root="."), sentences.ROOT_EMPTY.format(".")),
    "an unknown object": (
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
        sentences.WIDTH_NOT_DIVISIBLE.format(width=256, heads=3),
    ),
    "a patch larger than the image": (keys(model__patch_size=4000), sentences.PATCH_TOO_LARGE.format(4000)),
    "an unknown baseline": (
        keys(baselines="ib_iumad"),
        sentences.UNKNOWN_BASELINE.format(found="ib_iumad", known="feature_norm,gaussian,memory_bank"),
    ),
    "heads of iuf that do not divide the width": (
        keys(method="iuf", model__heads=1, model__width=6),
        sentences.WIDTH_NOT_DIVISIBLE_BY_HEADS_OF_IUF.format(6),
    ),
    "a grid that uniad's mask covers": (
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
    "textures that are not there": (
        keys(method="destseg", modality="rgb", destseg__textures="nowhere"),
        sentences.NO_TEXTURES.format("nowhere"),
    ),
    "an unknown optimiser": (
        keys(continual__optimizer="lion"),
        sentences.UNKNOWN_OPTIMIZER.format(found="lion", known="adamw, sgd"),
    ),
}


@pytest.mark.parametrize(("flags", "beginning"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_are_refused_before_the_workdir_is_created(root, tmp_path, flags, beginning):
    sentence = refused(tmp_path, *valid_flags(root), *flags)
    assert sentence.startswith(beginning)
    assert sentence.endswith(".")
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_refused_before_a_dataset_is_rendered(tmp_path):
    sentence = refused(tmp_path, "--config.baselines=patchcore", config=CONFIG.with_name("quickstart.py"))
    assert sentence.startswith(
        sentences.UNKNOWN_BASELINE.format(found="patchcore", known="feature_norm,gaussian,memory")[:-1]
    )
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_weights_with_executable_code_are_refused(root, tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    sentence = refused(tmp_path, *valid_flags(root), *keys(backbone__weights="evil.pth"))
    assert sentence.startswith(sentences.WEIGHTS_REFUSED.format("evil.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_a_workdir_that_cannot_be_created_is_refused(root, tmp_path):
    (tmp_path / "file").touch()
    sentence = refused(tmp_path, *valid_flags(root), workdir="file/run")
    assert sentence == sentences.WORKDIR_NOT_WRITABLE.format(folder="file/run", reason="Not a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "content", "beginning"),
    [
        ("mask.png", None, sentences.SAMPLE_FILE_MISSING),
        ("depth.png", b"", sentences.FILE_EMPTY),
        ("image_4.png", 60, sentences.FILE_DAMAGED),
        ("info_depth.yaml", b"!!python/object/apply:os.mkdir ['hacked']", sentences.YAML_REFUSED),
    ],
)
def test_a_damaged_file_of_the_dataset_is_refused(root, tmp_path, name, content, beginning):
    """These cases are found early and late; the reader's tests have all kinds of damage."""
    file = root / "Confetto" / "train" / "data" / f"01_{name}"
    original = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(original[:content] if isinstance(content, int) else content)
    try:
        sentence = refused(tmp_path, *valid_flags(root))
    finally:
        file.write_bytes(original)
    assert sentence.startswith(beginning.format(file))
    assert not (tmp_path / "hacked").exists()
    assert not list((tmp_path / "run").glob("prepared/*/manifest.json"))
    for name in ("results.json", "snapshots/0"):
        assert not (tmp_path / "run" / name).exists()
