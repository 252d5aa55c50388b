"""Runs that see parts of photographs: the region that matters, or tiles."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from iumad_jax import Detector, calibrate, choose, latency, main, predict
from iumad_jax.export import __main__ as export_command
from tests import sentences
from tests.integration.conftest import as_flags

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads a config
CONFIG = Path(__file__).parents[2] / "configs" / "folder.py"
KEYS = {
    "modality": "rgb",
    "method": "gaussian",
    "baselines": "",
    "input.size": 64,
    "backbone.grid": 8,
    "report.pictures_per_object": 1,
    "dataset.root": "strips",
    "dataset.prepared": "prepared",
}
SIZE = 64, 512  # columns and rows of a strip


def strip(seed, defects=()):
    """Draw a strip of evenly spaced bars with noise, and black spots at the rows of defects."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", SIZE, (180, 180, 180))
    draw = ImageDraw.Draw(image)
    for row in range(16, SIZE[1], 32):
        draw.rectangle([8, row - 6, 56, row + 6], fill=(90, 110, 140))
    for row in defects:
        draw.ellipse([24, row - 8, 40, row + 8], fill=(10, 10, 10))
    return Image.fromarray((np.asarray(image) + rng.normal(0, 2, (*SIZE[::-1], 3))).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for folder, count, defects in (("train/good", 6, ()), ("test/good", 2, ()), ("test/spot", 2, (272,))):
        for part in ("rgb", "mask") if defects else ("rgb",):
            (home / "strips/strip" / folder / part).mkdir(parents=True)
        for number in range(count):
            file = home / "strips/strip" / folder / "rgb" / f"{number}.png"
            strip(len(folder) * 100 + number, defects).save(file)
            if defects:
                mask = np.zeros(SIZE[::-1], np.uint8)
                mask[264:281, 24:41] = 255
                Image.fromarray(mask).save(file.parent.with_name("mask") / file.name)
    return home


def run(home, monkeypatch, command, *flags):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", arguments := ["command", *flags])  # ml_collections reads the keys from here
    return command.main(arguments)


def test_a_region_is_cut_in_training_and_prediction(home, monkeypatch):
    """A defect within the region is found where it is in the photograph; one outside is not seen."""
    keys = KEYS | {"input.region": "0,0.375,1,0.625"}  # rows 192 to 320
    assert run(home, monkeypatch, main, f"--config={CONFIG}:1-0", "--workdir=region", *as_flags(keys)) == 0
    (home / "new").mkdir()
    for name, defects in {"inside": (240,), "outside": (400,)}.items():
        strip(7, defects).save(home / "new" / f"{name}.png")
    assert run(home, monkeypatch, predict, "--workdir=region", "--input=new", "--output=region_out") == 0
    masks = {name: np.asarray(Image.open(home / f"region_out/masks/{name}.png")) > 0 for name in ("inside", "outside")}
    assert masks["inside"].shape == SIZE[::-1]
    assert masks["inside"][240, 32]
    assert not masks["inside"][:192].any()
    assert not masks["inside"][320:].any()
    detector = Detector.load(home / "region")
    inside, outside = (np.asarray(strip(7, defects)) for defects in ((240,), (400,)))
    found, batch = detector(inside), detector(np.stack([inside, outside]))
    np.testing.assert_array_equal(found.mask, masks["inside"])
    assert (found.map[240, 32] > found.pixel_threshold, found.map[:192].max(), found.map.shape) == (True, 0, (512, 64))
    assert found.anomalous
    np.testing.assert_allclose(batch.map[0], found.map, rtol=1e-3, atol=1e-4)
    good = detector(np.asarray(strip(7)))
    assert batch.score[1] == pytest.approx(float(good.score), rel=0.2)  # other noise
    assert batch.score[1] < batch.score[0] / 2


@pytest.fixture(scope="module")
def tiles(home):
    """Train a run on tiles of 512 / 6.25 = 82 rows: the fourth begins at 184, the fifth at 246."""
    keys = KEYS | {"method": "memory_bank", "memory_bank.megabytes": 0.3, "input.tiles": "8x1", "input.overlap": 0.25}
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(home, monkeypatch, main, f"--config={CONFIG}:1-0", "--workdir=tiles", *as_flags(keys)) == 0
    return home / "tiles"


def test_tiles_are_judged_together(home, tiles, monkeypatch, capsys):
    """A defect is found where it is, within a tile or in the overlap of two; run, `predict` and detector agree."""
    results = json.loads((home / "tiles/results.json").read_text())
    assert results["matrix"]["i_auroc"] == [[1.0]]
    assert results["matrix"]["aupro"][0][0] > 0.9
    (home / "tall").mkdir()
    places = {"within": 225, "overlap": 256}
    for name, row in places.items():
        strip(7, (row,)).save(home / f"tall/{name}.png")
    assert run(home, monkeypatch, predict, "--workdir=tiles", "--input=tall", "--output=tiles_out") == 0
    predictions = json.loads((home / "tiles_out/predictions.json").read_text())["images"]
    detector = Detector.load(home / "tiles")
    detections = detector(np.stack([np.asarray(strip(7, (row,))) for row in places.values()]))
    for number, (name, row) in enumerate(places.items()):
        mask = np.asarray(Image.open(home / f"tiles_out/masks/{name}.png")) > 0
        assert (mask.shape, mask[row, 32]) == ((512, 64), True)
        assert not mask[: row - 40].any()
        assert not mask[row + 40 :].any()
        assert (detections.mask[number] != mask).mean() < 1e-3
        (predicted,) = [values for values in predictions if values["image"] == name]
        assert (predicted["decision"], detections.decision[number]) == ("anomalous", "anomalous")
        assert predicted["score"] == pytest.approx(float(detections.score[number]), rel=1e-4)
    assert not detector(np.asarray(strip(7))).anomalous
    capsys.readouterr()
    for command, flags, sentence in (
        (export_command, ("--format=onnx",), sentences.NO_EXPORT_OF_TILES.format("8x1")),
        (latency, (), sentences.NO_TILES.format(tiles="8x1", what="latency measures predictions")),
        (choose, (), sentences.NO_TILES.format(tiles="8x1", what="choose pastes defects")),
    ):
        assert run(home, monkeypatch, command, "--workdir=tiles", *flags) == 2
        assert sentence in capsys.readouterr().err
    assert not (home / "tiles/detector.onnx").exists()


def test_calibration_knows_tiles(home, tiles, monkeypatch):
    """What a person calls good is no alarm after `calibrate`, though its size differs; a real defect is one."""
    shutil.copytree(tiles, home / "calibrated")
    (home / "more/strip/train/good/rgb").mkdir(parents=True)
    (home / "judged").mkdir()
    odd = np.asarray(strip(8), float)
    odd[100:112, 16:48] += 60, -60, -60  # in the second of eight tiles
    large = Image.fromarray(odd.clip(0, 255).astype(np.uint8)).resize((96, 768), Image.Resampling.BICUBIC)
    for file in (home / "more/strip/train/good/rgb/odd.png", home / "judged/odd.png"):
        large.save(file)
    strip(9, (272,)).save(home / "judged/spot.png")
    rows = []
    for output in ("before", "after"):
        flags = "--workdir=calibrated", "--input=judged", f"--output={output}"
        assert run(home, monkeypatch, predict, *flags) == 0
        images = json.loads((home / output / "predictions.json").read_text())["images"]
        rows.append({row["image"]: row for row in images})
        detector = Detector.load(home / "calibrated")
        for name, row in rows[-1].items():
            detection = detector(np.asarray(Image.open(home / f"judged/{name}.png")))
            assert row["decision"] == detection.decision
            assert row["score"] == pytest.approx(float(detection.score), rel=1e-5)
        if output == "before":
            flags = "--workdir=calibrated", "--config.dataset.root=more"
            assert run(home, monkeypatch, calibrate, *flags) == 0
    before, after = rows
    assert [before[name]["decision"] for name in ("odd", "spot")] == ["anomalous", "anomalous"]
    assert [after[name]["decision"] for name in ("odd", "spot")] == ["good", "anomalous"]
    assert after["odd"]["score"] < after["odd"]["threshold"] < 1.001 * after["odd"]["score"]
