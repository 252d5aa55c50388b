"""A run opened in Python, which learns from arrays."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax import Camera, Detector, learn, open_run
from iumad_jax.data import plan
from iumad_jax.data.readers.folder import Folder
from iumad_jax.errors import UserError
from iumad_jax.runtime import snapshots
from iumad_jax.training import arrays
from tests import sentences
from tests.integration.test_dataset_changes import files
from tests.integration.test_learn import add, run, same_snapshots

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
BANK = {"method": "memory_bank", "baselines": "", "modality": "rgb+depth"}
CAMERA = Camera(80, 80, 31.5, 31.5)


def depths(count, seed):
    """Return depth of a plane half a metre away, with ridges whose width depends on the object."""
    rng = np.random.default_rng(seed)
    ridges = 0.5 - 0.01 * (np.arange(64) // (4 + 3 * seed) % 2) * np.ones((64, 1))
    return (ridges + rng.normal(0, 2e-4, (count, 64, 64))).astype(np.float32)


def photographs(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(Path(folder).glob("*.png"))])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
    """Create a run of bolt and nut, and the images of washer elsewhere, all with depth."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for root, names in (("objects", ("bolt", "nut")), ("later", ("washer",))):
            add(*names, root=root)
            for seed, folder in enumerate(sorted(Path(root).glob("*/*/*/rgb"))):
                (folder.parent / "depth").mkdir()
                for file, depth in zip(sorted(folder.glob("*.png")), depths(6, seed), strict=False):
                    np.save(folder.parent / "depth" / f"{file.stem}.npy", depth)
            keys = ("fx", "fy", "cx", "cy")
            camera = ", ".join(f"{key}: {getattr(CAMERA, key)}" for key in keys)
            Path(root, "dataset.yaml").write_text(f"camera: {{{camera}}}\n")
        run(protocol="2-0", **BANK)
    return home


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")


def washer():
    """Return photographs and depth of washer."""
    good = Path("later/washer/train/good")
    return photographs(good / "rgb"), np.stack([np.load(file) for file in sorted(good.glob("depth/*"))])


@pytest.mark.usefixtures("home")
def test_arrays_are_learned_as_from_a_folder():
    """Interrupted after its training, the same call goes on; so it does in a run that was moved."""
    shutil.copytree("run", "by_command")
    arguments = ["learn", "--workdir=by_command", "--config.dataset.root=later"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)  # ml_collections reads it
        assert learn.main(arguments) == 0
    opened = open_run("run")
    before = opened.detector
    line = opened.learn("washer", *washer())
    same_snapshots("run", "by_command", 1)
    assert line.startswith("step 1: learned washer (threshold ")
    assert "\n" not in line
    assert "learned washer" in opened.history().splitlines()[-1]
    assert (before.objects, opened.detector.objects) == (("bolt", "nut"), ("bolt", "nut", "washer"))
    assert opened.detector is opened.detector
    rgb, depth = washer()
    assert set(opened.detector(rgb, depth).object) == {"washer"}

    shutil.rmtree("run/snapshots/1")
    Path("run/results.json").unlink()
    with pytest.raises(UserError, match=sentences.STEP_BEGUN_OTHERWISE.split(" {keys}")[0].format(object="washer")):
        open_run("run").learn("washer", rgb[:5], depth[:5])
    open_run("run").learn("washer", list(rgb), list(depth))
    same_snapshots("run", "by_command", 1)
    shutil.move("run", "moved")
    opened = open_run("moved")
    assert opened.retire("nut").startswith("step 2: retired nut")
    assert opened.detector(rgb[0], depth[0]).object == "washer"


@pytest.mark.usefixtures("home")
def test_a_learned_object_is_updated_and_calibrated():
    opened = open_run("run")
    rng, bolt = np.random.default_rng(0), photographs("objects/bolt/train/good/rgb")
    rgb = (bolt[:4] + rng.normal(0, 12, bolt[:4].shape)).clip(0, 255).astype(np.uint8)
    line = opened.learn("bolt", rgb, depths(4, 0), update=True)
    assert line.startswith("step 1: updated bolt ")
    counts = [snapshots.read(Path("run"), step).recognition["count"] for step in (0, 1)]
    assert (counts[1] - counts[0]).tolist() == [4, 0]

    odd = 255 - bolt[0], depths(1, 3)[0]
    assert opened.calibrate("bolt", *odd).startswith("step 2: calibrated bolt ")
    scores = [snapshots.read(Path("run"), step).calibration["bolt"].score for step in (1, 2)]
    score = opened.detector(*odd, object="bolt").score
    assert [np.isclose(values, score, rtol=1e-3).any() for values in scores] == [False, True]
    bank = [snapshots.read(Path("run"), step).variables for step in (1, 2)]
    jax.tree.map(np.testing.assert_array_equal, *bank)
    with pytest.raises(UserError, match=sentences.NO_NEW_IMAGES.format(kind="good", objects="bolt")):
        opened.calibrate("bolt", *odd)
    assert [step.act for step in plan.read(Path("run"))] == ["learn", "update", "calibrate"]


@pytest.mark.usefixtures("home")
def test_written_images_are_prepared_as_a_detector_prepares_the_arrays():
    """A dataset's settings cannot describe an orthographic camera."""
    detector = Detector.load("run")
    rgb, depth = (array[0] for array in washer())
    depth[20:30, 20:30] = np.nan
    cropped = rgb[:32, :48], depth[:32, :48]
    orthographic = Camera(400, 400, 31.5, 31.5, orthographic=True)
    heights = replace(orthographic, cx=0, cy=0, heights=True)
    for images, camera in (((rgb, depth), None), (cropped, None), ((rgb, depth), orthographic), (cropped, heights)):
        root = arrays.write(Path("run"), detector, "washer", *images, camera)
        assert arrays.write(Path("run"), detector, "washer", *images, camera) == root
        reader = Folder(root, needs_depth=True)
        for field in ("object_height", "height_range", "normals_window"):
            assert getattr(reader, field) == getattr(detector.processing, field)
        (id_,) = reader.ids("washer", "train")
        written = detector.processing(reader.read("washer", "train", id_))
        for modality, expected in detector.prepare(*images, camera).items():
            np.testing.assert_allclose(written[f"images_{modality}"], expected[0], atol=0.2)


@pytest.mark.usefixtures("home")
def test_a_full_disk_leaves_nothing_half_written(files_no_larger_than):
    detector = Detector.load("run")
    with files_no_larger_than(9000), pytest.raises(UserError, match="cannot write"):  # depth has 16 kB
        arrays.write(Path("run"), detector, "washer", *washer(), None)
    assert not list(Path("run/images").iterdir())


def changed(array, at, value):
    copy = array.copy()
    copy[at] = value
    return copy


REFUSED = {
    "a learned object": (lambda run, *images: run.learn("nut", *images), "has learned nut already; pass update=True"),
    "an unknown object": (lambda run, *images: run.learn("screw", *images, update=True), 'has not learned "screw"'),
    "calibrating an unknown object": (lambda run, *images: run.calibrate("screw", *images), 'not learned "screw"'),
    "another object": (
        lambda run, _, depth: run.learn("nut", photographs("objects/bolt/train/good/rgb"), depth, update=True),
        "100% of the further images of nut are taken for bolt",
    ),
    "a path as name": (lambda run, *images: run.learn("a/b", *images), "'a/b' cannot be the name of an object"),
    "a list as name": (lambda run, *images: run.learn(["a"], *images), "['a'] cannot be the name of an object"),
    "two names": (lambda run, *images: run.calibrate("bolt,nut", *images), "cannot be the name of an object"),
    "no images": (lambda run, rgb, _: run.learn("screw", rgb[:0]), "rgb holds no images"),
    "None": (lambda run, rgb, _: run.learn("screw", None), "rgb holds no images"),
    "grey images": (lambda run, rgb, depth: run.learn("screw", rgb[..., 0], depth), "rgb[0] is not an array of 3 axes"),
    "floats": (lambda run, rgb, depth: run.learn("screw", rgb / 255, depth), "image 0 of 6: rgb is float64 of shape"),
    "no depth": (lambda run, rgb, _: run.learn("screw", rgb), "depth holds no images"),
    "too little depth": (
        lambda run, rgb, depth: run.learn("screw", rgb, depth[1:]),
        "rgb holds 6 images and depth 5; pass one depth per image.",
    ),
    "depth of another size": (
        lambda run, rgb, depth: run.learn("screw", rgb, depth[:, 1:]),
        "image 0 of 6: depth is float32 of shape (63, 64)",
    ),
    "depth of several sizes": (
        lambda run, rgb, depth: run.learn("screw", [rgb[0], rgb[0, 1:]], [depth[0], depth[0, 1:]]),
        "depth holds images of several sizes",
    ),
    "no measured depth": (
        lambda run, rgb, depth: run.learn("screw", rgb, changed(depth, 3, np.nan)),
        "image 3 of 6: the depth image has no valid pixel",
    ),
    "millimetres": (
        lambda run, rgb, depth: run.learn("screw", rgb, 1000 * depth),
        "as if millimetres were read as metres; pass metres.",
    ),
    "a camera as a tuple": (
        lambda run, *images: run.learn("screw", *images, camera=(80, 80, 32, 32)),
        sentences.NOT_A_CAMERA.format("tuple"),
    ),
    "the last object": (lambda run, *_: run.retire("bolt,nut"), "would retire every object"),
    "no run": (lambda *_: open_run("objects"), sentences.NO_RUN_IN_WORKDIR.format("objects")),
    "no path": (lambda *_: open_run(None), sentences.WORKDIR_NOT_A_PATH.format("NoneType")),
}


@pytest.mark.parametrize(("act", "sentence"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("home")
def test_a_mistake_is_told_and_changes_nothing(act, sentence):
    before, opened = files(Path("run")), open_run("run")
    with pytest.raises(UserError) as error:
        act(opened, *washer())
    assert sentence in str(error.value)
    after = files(Path("run"))
    assert not [path for path in after.keys() - before.keys() if "prepared" not in path.parts]
    assert {path: after.get(path) for path in before} == before
