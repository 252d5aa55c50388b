"""The command predict. All tests share one run of a method without training, which is faster."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax.data.readers import unlabelled
from iumad_jax.data.readers.folder import Folder
from iumad_jax.errors import UserError
from iumad_jax.inference import predictions, unknown_images
from tests import sentences
from tests.integration.trained import NEVER_LEARNED, QUICKSTART, in_process, samples, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture(scope="module")
def home(tmp_path_factory, candies):
    return train(tmp_path_factory.mktemp("home"), candies, method="feature_norm", baselines="")


def test_predict_writes_the_results_of_the_detector(home, command, detector, reader):
    for folder in ("rgb/sub", "depth/sub"):
        (home / "in" / folder).mkdir(parents=True)
    inputs = {"cane": samples(reader, "CandyCane")[1], "sub/pop": samples(reader, NEVER_LEARNED)[0]}
    for name, sample in inputs.items():
        Image.fromarray(sample.rgb).save(home / "in" / "rgb" / f"{name}.png")
        millimetres = np.nan_to_num(sample.depth * 1000)
        np.save(home / "in" / "depth" / f"{name}.npy", millimetres)
    (home / "in" / "rgb" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    flags = ["--input=in/rgb", "--depth=in/depth", "--depth_unit=0.001", "--output=out"]
    code, out, err = in_process(home, "predict", "--workdir=run", *flags)
    assert code == 2
    assert out.splitlines()[1:] == [sentences.GROUP_OF_ONE.format(name="new_object_1", root="out/unknown")]
    bad, summary = err.splitlines()
    assert bad == f"iumad_jax: {sentences.FILE_DAMAGED.format('in/rgb/bad.png')}."
    assert summary == f"iumad_jax: {sentences.IMAGES_NOT_USED.format(bad=1, all=3, output='out')}"
    written = json.loads((home / "out" / "predictions.json").read_text())
    assert [image["image"] for image in written["damaged"]] == ["bad"]
    assert written["step"] == 1
    with (home / "out" / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    for name, row, line in zip(inputs, written["images"], table, strict=True):
        sample = inputs[name]
        detection = detector(sample.rgb, sample.depth)
        assert {key: str(value) for key, value in row.items()} == line
        assert (row["image"], row["decision"], row["object"]) == (name, detection.decision, detection.object)
        assert row["score"] == pytest.approx(float(detection.score), rel=1e-3)  # millimetres are rounded
        assert (row["distance"] > row["unknown_threshold"]) == (row["decision"] == "unknown")
        assert row["defective_share"] == pytest.approx(detection.mask.mean(), abs=1e-3)
        mask = np.asarray(Image.open(home / "out" / row["mask"]))
        assert mask.shape == sample.rgb.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        assert mask.mean() / 255 == pytest.approx(detection.mask.mean(), abs=0.02)
        heatmap = np.asarray(Image.open(home / "out" / row["heatmap"])).astype(int)
        strong = np.asarray(Image.fromarray(detection.map).resize((64, 64))) > 0.7 * detection.pixel_threshold
        changed = np.abs(heatmap - sample.rgb).sum(-1) > 10
        assert changed[strong].mean() > 0.9
    assert not list((home / "out").rglob("*.unfinished"))
    before = {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*")}
    code, _, err = command("predict", "--workdir=run", *flags)
    assert (code, err) == (2, f"iumad_jax: {sentences.OUTPUT_NOT_EMPTY.format('out')}\n")
    assert {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*")} == before


@pytest.mark.parametrize(("page", "unit"), [("README.md", 1), ("iumad_jax/inference/README.md", 0.001)])
def test_command_and_python_of_the_readmes_agree(home, command, reader, capsys, tmp_path, monkeypatch, page, unit):
    """As they are printed, in a folder that has what they name."""
    text = (QUICKSTART.parents[1] / page).read_text()
    flags = re.search(r"^python -m iumad_jax\.predict (.+)$", text, re.MULTILINE)[1]
    python = re.search(r"```python\n(from iumad_jax import Detector\n.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for run in {*re.findall(r"--workdir=(\S+)", flags), *re.findall(r'load\("(.+?)"', python)}:
        Path(run).parent.mkdir(exist_ok=True)
        Path(run).symlink_to(home / "run")
    Path("PHOTOS").mkdir()
    Path("DEPTHS").mkdir()
    sample = samples(reader, "CandyCane")[1]
    Image.fromarray(sample.rgb).save("PHOTOS/1.png")
    np.save("DEPTHS/1.npy", sample.depth / unit)
    code, _, err = command("predict", *shlex.split(flags))
    assert code == 0, err
    (row,) = json.loads(Path("RESULTS/predictions.json").read_text())["images"]
    exec(python, {"rgb": sample.rgb, "depth": sample.depth})
    decision, object_, score = capsys.readouterr().out.split()
    assert (decision, object_) == (row["decision"], row["object"])
    assert float(score) == pytest.approx(row["score"], rel=1e-3)


def test_a_missing_unit_is_reported_once_and_nothing_is_written(home, command, reader):
    for folder in ("counts/rgb", "counts/depth"):
        (home / folder).mkdir(parents=True)
    for number, sample in enumerate(samples(reader, "CandyCane")[:2]):
        Image.fromarray(sample.rgb).save(home / "counts" / "rgb" / f"{number}.png")
        Image.fromarray((sample.depth * 1000).astype(np.uint16)).save(home / "counts" / "depth" / f"{number}.png")
    flags = ["--workdir=run", "--input=counts/rgb", "--depth=counts/depth", "--output=counted"]
    code, out, err = command("predict", *flags)
    assert (code, out) == (2, "")
    assert err == (
        f"iumad_jax: counts/depth/0.png {sentences.UNIT_UNKNOWN.format(remedy=sentences.SET_UNIT_BY_FLAG)}\n"
    )
    assert command("predict", *flags, "--depth_unit=0.001")[0] == 0
    assert len(json.loads((home / "counted" / "predictions.json").read_text())["images"]) == 2


@pytest.mark.parametrize("exists", [False, True])
def test_without_a_usable_image_nothing_is_written(home, command, exists):
    """A folder that was there stays."""
    for folder in ("rgb", "depth"):
        (home / f"broken{exists}" / folder).mkdir(parents=True)
        (home / f"broken{exists}" / folder / "image.png").write_text("no image")
    output = home / f"nothing{exists}"
    if exists:
        output.mkdir()
    flags = f"--input=broken{exists}/rgb", f"--depth=broken{exists}/depth", f"--output={output.name}"
    code, _, err = command("predict", "--workdir=run", *flags)
    assert (code, "1 of 1 images cannot be used; correct them." in err) == (2, True)
    assert output.exists() == exists
    assert not exists or not list(output.iterdir())


def test_predictions_before_a_file_cannot_be_written_are_listed(home, detector, reader):
    images = list(unlabelled.split_images(reader, "test"))[:4]
    blocked = home / "cut" / "heatmaps" / f"{images[2].name}.png"
    blocked.mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(sentences.CANNOT_WRITE.format(blocked))):
        predictions.predict(detector, images, "run", None, home / "cut")
    assert list(rows_of(home / "cut")) == [image.name for image in images[:2]]


def test_watch_judges_new_images_and_stops(home, command, reader):
    """A second thread adds images once the first ones are judged, and then sends SIGTERM to this process."""
    for folder in ("line/rgb", "line/depth"):
        (home / folder).mkdir(parents=True)

    def add(name, sample):
        np.save(home / "line" / "depth" / f"{name}.npy", sample.depth)
        Image.fromarray(sample.rgb).save(home / "line" / "rgb" / f"{name}.png")

    def run_line():
        canes = samples(reader, "CandyCane")
        try:
            for name, sample in (("first", canes[0]), ("second", canes[1])):
                add(name, sample)
                end = time.monotonic() + 60
                while not (home / "watched" / "heatmaps" / f"{name}.png").exists() and time.monotonic() < end:
                    time.sleep(0.05)
            (home / "line" / "depth" / "bad.npy").write_bytes(b"nothing")
            add("bad", canes[0])
            (home / "line" / "depth" / "bad.npy").write_bytes(b"nothing")
            time.sleep(2)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    line = threading.Thread(target=run_line)
    line.start()
    flags = ["--workdir=run", "--watch", "--input=line/rgb", "--depth=line/depth", "--output=watched"]
    code, out, err = command("predict", *flags)
    line.join()
    assert code == 0, err
    lines = [json.loads(text) for text in out.splitlines()]
    assert [line["image"] for line in lines][:2] == ["first", "second"]
    assert lines[-1]["image"] == "bad"
    assert sentences.FILE_UNREADABLE.format("line/depth/bad.npy") in lines[-1]["reason"]
    written = json.loads((home / "watched" / "predictions.json").read_text())
    assert (written["images"], written["damaged"][-1]) == (lines[:2], lines[-1])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_heatmaps_are_of_the_chosen_size(home, command, reader):
    sample = samples(reader, "CandyCane")[0]
    (home / "large").mkdir()
    (home / "large depth").mkdir()
    Image.fromarray(sample.rgb.repeat(13, 0).repeat(13, 1)).save(home / "large" / "cane.png")
    np.save(home / "large depth" / "cane.npy", sample.depth.repeat(13, 0).repeat(13, 1))
    sizes = {}
    for choice in ("none", "small", "full"):
        flags = ["--input=large", "--depth=large depth", f"--heatmaps={choice}", f"--output=of_{choice}"]
        assert command("predict", "--workdir=run", *flags)[0] == 0
        row = rows_of(home / f"of_{choice}")["cane"]
        file = home / f"of_{choice}" / row["heatmap"]
        sizes[choice] = np.asarray(Image.open(file)).shape if row["heatmap"] else None
        assert np.asarray(Image.open(home / f"of_{choice}" / row["mask"])).shape == (832, 832)
        assert (home / f"of_{choice}" / "predictions.html").exists()
    assert sizes == {"none": None, "small": (640, 640, 3), "full": (832, 832, 3)}
    assert not (home / "of_none" / "heatmaps").exists()


def test_predict_reads_a_dataset(home, command, detector, reader):
    code, out, err = command("predict", "--workdir=run", "--output=all", f"--config.dataset.objects={NEVER_LEARNED}")
    assert code == 0, err
    assert out.endswith(
        "\n" + sentences.IMAGES_JUDGED.format(images=4, good=0, anomalous=0, unknown=4, output="all") + "\n"
    )
    assert len(list((home / "all" / "masks" / NEVER_LEARNED).glob("*.png"))) == 4
    group = Folder(home / "all" / "unknown", "new_object_1", needs_depth=True)
    ids, processing = group.ids("new_object_1", "train"), detector.processing
    for id_, original in zip(ids, samples(reader, NEVER_LEARNED), strict=True):
        sample = group.read("new_object_1", "train", id_)
        np.testing.assert_array_equal(sample.rgb, original.rgb)
        np.testing.assert_array_equal(sample.depth, original.depth)
        fitted, camera = dataclasses.astuple(sample.camera), dataclasses.astuple(original.camera)
        assert fitted == pytest.approx(camera, abs=1e-3)
    settings = processing.object_height, processing.height_range, processing.normals_window
    assert (group.object_height, group.height_range, group.normals_window) == settings


def rows_of(folder):
    return {row["image"]: row for row in json.loads((folder / "predictions.json").read_text())["images"]}


def test_chosen_thresholds_decide_anew(home, command, reader):
    """The thresholds of one object are chosen so that half of its images exceed them; the other's stay."""
    assert command("predict", "--workdir=run", "--output=as_run")[0] == 0
    before = rows_of(home / "as_run")
    canes = [name for name in before if name.startswith("CandyCane")]
    score = float(np.median([before[name]["score"] for name in canes]))
    chosen = f"--threshold=CandyCane={score}"
    assert command("predict", "--workdir=run", chosen, "--output=chosen")[0] == 0
    after = rows_of(home / "chosen")
    fields = ("score", "relative_score", "decision", "threshold", "defective_share")
    for name, row in after.items():
        assert row["relative_score"] == pytest.approx(row["score"] / (row["score"] + row["threshold"]))
        if row["object"] == "CandyCane":
            assert row["threshold"] == pytest.approx(score)
            assert (row["decision"] == "anomalous") == (before[name]["score"] > score)
        else:
            assert [row[field] for field in fields] == [before[name][field] for field in fields]
    code, out, err = command("evaluate", "--workdir=run", chosen, "--output=chosen_evaluation")
    assert code == 0, err
    assert re.search(r"^CandyCane .* chosen ", out, re.MULTILINE)
    tested = json.loads((home / "chosen_evaluation" / "results.json").read_text())["decisions"][0]["objects"]
    alarm = np.array([after[name]["decision"] == "anomalous" for name in canes])
    anomalous = np.array([sample.anomalous for sample in samples(reader, "CandyCane")])
    assert tested["CandyCane"]["test"]["precision"] == anomalous[alarm].mean()
    assert tested["CandyCane"]["test"]["recall"] == alarm[anomalous].mean()


def test_a_lower_quantile_lowers_the_thresholds(home, command):
    for quantile in (0.995, 0.5):
        code, _, err = command("predict", "--workdir=run", f"--quantile={quantile}", f"--output=quantile{quantile}")
        assert code == 0, err
    high, low = (rows_of(home / f"quantile{quantile}") for quantile in (0.995, 0.5))
    assert all(low[name]["threshold"] < row["threshold"] for name, row in high.items())
    assert {name: row["score"] for name, row in low.items()} == {name: row["score"] for name, row in high.items()}
    code, _, err = command("evaluate", "--workdir=run", "--config.decisions.quantile=0.9")
    assert (code, err.startswith(f"iumad_jax: {sentences.QUANTILE_FIXED}")) == (2, True)
    assert command("evaluate", "--workdir=run", "--quantile=0.5")[0] == 0
    (evaluation,) = (home / "run" / "evaluations").glob("eyecandies_*_step1")
    decided = json.loads((evaluation / "results.json").read_text())["decisions"][0]
    assert decided["quantile"] == 0.5
    thresholds = {row["object"]: row["threshold"] for row in low.values()}
    assert {name: record["image"]["threshold"] for name, record in decided["objects"].items()} == thresholds


def test_unknown_images_become_one_object_per_kind(home, command, reader):
    """After the first step, two kinds are unknown; predict mixes them and a known one, in several folders."""
    inputs = {}
    for number, name in itertools.product(range(3), ["CandyCane", "GummyBear", NEVER_LEARNED]):
        sample = samples(reader, name, "train")[number]
        key = f"{number}/{name[::-1]}"
        rgb, depth = home / "mix" / f"{key}.png", home / "mixed depth" / f"{key}.png"
        for file in (rgb, depth):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.rgb).save(rgb)
        Image.fromarray((sample.depth * 1000).astype(np.uint16)).save(depth)
        inputs[key] = name, sample, rgb, depth
    flags = ["--step=0", "--input=mix", "--depth=mixed depth", "--depth_unit=0.001", "--camera=88,89,31,32"]
    code, out, err = command("predict", "--workdir=run", *flags, "--output=new ones")
    assert code == 0, err
    rows = json.loads((home / "new ones" / "predictions.json").read_text())["images"]
    objects_by_group = {}
    for row in rows:
        objects_by_group.setdefault(row["group"], []).append(inputs[row["image"]][0])
    kinds = sorted(sorted(names) for names in objects_by_group.values())
    assert kinds == [["CandyCane"] * 3, ["GummyBear"] * 3, [NEVER_LEARNED] * 3]
    assert objects_by_group[""] == ["CandyCane"] * 3
    lines = out.splitlines()
    root = home / "new ones" / "unknown"
    for group in ("new_object_1", "new_object_2"):
        at = lines.index(sentences.GROUP.format(name=group, images=3, root="new ones/unknown"))
        program, *arguments = shlex.split(lines[at + 1])[2:]
        assert program == "iumad_jax.learn"
        dataset = ["--config.dataset.name=folder", "--config.dataset.root=new ones/unknown"]
        assert arguments == ["--workdir=run", f"--objects={group}", *dataset]
        members = [inputs[row["image"]] for row in rows if row["group"] == group]
        folder = Folder(root, group, needs_depth=True)
        for (_, sample, *files), id_ in zip(members, folder.ids(group, "train"), strict=True):
            copies = folder.files(group, "train", id_)[:2]
            assert [copy.read_bytes() for copy in copies] == [file.read_bytes() for file in files]
            read = folder.read(group, "train", id_)
            np.testing.assert_allclose(read.depth, sample.depth, atol=1.1e-3)
            assert dataclasses.astuple(read.camera) == (88, 89, 31, 32, False, False)
        assert len([path for path in (root / group).rglob("*") if path.is_file()]) == 6
        picture = np.asarray(Image.open(root / f"{group}.jpg"), float)
        for number, (_, sample, *_) in enumerate(members):
            panel = picture[85:225, number * 160 + 10 : number * 160 + 150]
            shown = np.asarray(Image.fromarray(sample.rgb).resize((160, 160)), float)[10:150, 10:150]
            assert np.abs(panel - shown).mean() < 6


def test_an_object_is_named_after_those_learned(home, detector, reader):
    learned_before = dataclasses.replace(detector, objects=("new_object_1", "GummyBear"))
    images = list(unlabelled.split_images(reader, "test"))[:1]
    embeddings = np.zeros((1, len(detector.state.recogniser.centre)), np.float32)
    (group,) = unknown_images.write(learned_before, images, embeddings, home / "next")
    assert group.name == "new_object_2"
    assert Folder(home / "next").objects == ("new_object_2",)
