"""What people do with a trained model: predict, evaluate, export. One run is trained for all tests."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from iumad_jax import evaluate, predict, robustness
from iumad_jax.data.degradation import FAULTS
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.errors import UserError
from iumad_jax.export import __main__ as export
from iumad_jax.inference import predictions
from iumad_jax.runtime import snapshots
from tests import sentences
from tests.integration.trained import LEARNED, NEVER, in_process, results_of, samples, stacked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture
def command(home, capsys, monkeypatch):
    """Runs a command within this process, which spares its start: exit code, standard output, standard error."""
    monkeypatch.chdir(home)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", arguments := ["command", *flags])  # where ml_collections looks for keys
        commands = {"predict": predict, "evaluate": evaluate, "export": export, "robustness": robustness}
        code = commands[name].main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_predict_writes_what_the_detector_says(home, command, detector, reader):
    for folder in ("rgb/sub", "depth/sub"):
        (home / "in" / folder).mkdir(parents=True)
    given = {"cane": samples(reader, "CandyCane")[1], "sub/pop": samples(reader, NEVER)[0]}
    for name, one in given.items():
        Image.fromarray(one.rgb).save(home / "in" / "rgb" / f"{name}.png")
        millimetres = np.nan_to_num(one.depth * 1000)
        np.save(home / "in" / "depth" / f"{name}.npy", millimetres)
    (home / "in" / "rgb" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    flags = ["--input=in/rgb", "--depth=in/depth", "--depth_unit=0.001", "--output=out"]
    code, out, err = in_process(home, "predict", "--workdir=run", *flags)
    assert (code, out) == (2, "")
    bad, summary = err.splitlines()
    assert bad == f"iumad_jax: {sentences.FILE_DAMAGED.format('in/rgb/bad.png')}."
    assert summary == f"iumad_jax: {sentences.IMAGES_NOT_USED.format(bad=1, all=3, output='out')}"
    written = json.loads((home / "out" / "predictions.json").read_text())
    assert [one["image"] for one in written["damaged"]] == ["bad"]
    assert written["step"] == 1
    with (home / "out" / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    for name, row, line in zip(given, written["images"], table, strict=True):
        one = given[name]
        told = detector(one.rgb, one.depth)
        assert {key: str(value) for key, value in row.items()} == line
        assert (row["image"], row["decision"], row["object"]) == (name, told.decision, told.object)
        assert row["score"] == pytest.approx(float(told.score), rel=1e-3)  # millimetres are rounded
        assert (row["distance"] > row["unknown_threshold"]) == (row["decision"] == "unknown")
        assert row["defective_share"] == pytest.approx(told.mask.mean(), abs=1e-3)
        mask = np.asarray(Image.open(home / "out" / row["mask"]))
        assert mask.shape == one.rgb.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        assert mask.mean() / 255 == pytest.approx(told.mask.mean(), abs=0.02)
        heatmap = np.asarray(Image.open(home / "out" / row["heatmap"])).astype(int)
        strong = np.asarray(Image.fromarray(told.map).resize((64, 64))) > 0.7 * told.pixel_threshold
        changed = np.abs(heatmap - one.rgb).sum(-1) > 10
        assert changed[strong].mean() > 0.9
    assert not list((home / "out").rglob("*.unfinished"))
    before = {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*")}
    code, _, err = command("predict", "--workdir=run", *flags)
    assert (code, err) == (2, f"iumad_jax: {sentences.OUTPUT_NOT_EMPTY.format('out')}\n")
    assert {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*")} == before


def test_a_unit_that_is_missing_is_told_once_and_leaves_nothing(home, command, reader):
    for folder in ("counts/rgb", "counts/depth"):
        (home / folder).mkdir(parents=True)
    for number, one in enumerate(samples(reader, "CandyCane")[:2]):
        Image.fromarray(one.rgb).save(home / "counts" / "rgb" / f"{number}.png")
        Image.fromarray((one.depth * 1000).astype(np.uint16)).save(home / "counts" / "depth" / f"{number}.png")
    flags = ["--workdir=run", "--input=counts/rgb", "--depth=counts/depth", "--output=counted"]
    code, out, err = command("predict", *flags)
    assert (code, out) == (2, "")
    assert err == (
        f"iumad_jax: counts/depth/0.png {sentences.UNIT_UNKNOWN.format(remedy=sentences.UNIT_GIVEN_BY_FLAG)}\n"
    )
    assert command("predict", *flags, "--depth_unit=0.001")[0] == 0
    assert len(json.loads((home / "counted" / "predictions.json").read_text())["images"]) == 2


def test_an_evaluation_that_fails_leaves_earlier_results(home, command):
    shutil.copytree(home / "candies", home / "spoiled")
    flags = ["--workdir=run", "--output=before", "--config.dataset.root=spoiled"]
    assert command("evaluate", *flags)[0] == 0
    before = {path: path.read_bytes() for path in (home / "before").rglob("*") if path.is_file()}
    (home / "spoiled" / "GummyBear" / "test_public" / "data" / "03_image_4.png").write_bytes(b"")
    assert command("evaluate", *flags)[0] == 2
    assert {path: path.read_bytes() for path in (home / "before").rglob("*") if path.is_file()} == before


def test_what_was_predicted_before_the_disk_was_full_is_listed(home, command, files_no_larger_than, monkeypatch):
    flags = ["--workdir=run", "--output=cut", f"--config.dataset.objects={NEVER}"]
    written, write = [], predictions._write_image

    def write_three(path, pixels):
        if len(written) < 3:
            written.append(path)
            return write(path, pixels)
        with files_no_larger_than(10):
            return write(path, pixels)

    monkeypatch.setattr(predictions, "_write_image", write_three)
    code, out, err = command("predict", *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"iumad_jax: {sentences.CANNOT_WRITE.format('cut/heatmaps/Lollipop/')}")
    assert len(json.loads((home / "cut" / "predictions.json").read_text())["images"]) == 1


def test_predict_looks_at_a_dataset(home, command):
    code, out, err = command("predict", "--workdir=run", "--output=all", f"--config.dataset.objects={NEVER}")
    assert code == 0, err
    assert out == sentences.IMAGES_JUDGED.format(images=4, good=0, anomalous=0, unknown=4, output="all") + "\n"
    assert len(list((home / "all" / "masks" / NEVER).glob("*.png"))) == 4


def test_evaluate_repeats_what_training_found(home, command):
    code, out, err = command("evaluate", "--workdir=run", "--output=again")
    assert code == 0, err
    before, again = results_of(home / "run"), results_of(home / "again")
    assert again["matrix"] == {metric: [rows[-1]] for metric, rows in before["matrix"].items()}
    for name, baseline in before["baselines"].items():
        assert again["baselines"][name]["matrix"] == {metric: [rows[-1]] for metric, rows in baseline["matrix"].items()}
    assert again["decisions"] == before["decisions"][-1:]
    assert command("evaluate", "--workdir=run")[1].endswith(
        sentences.RESULTS_ARE_IN.format("run/evaluations/eyecandies_step1") + "\n"
    )
    assert again["evaluated"] == {"workdir": "run", "step": 1, "learned": 2}
    out_of_one = command("evaluate", "--workdir=run", "--output=one", "--config.dataset.objects=CandyCane")[1]
    assert (
        sentences.STRATEGY_STORES_SHORTLY.format(f"{before['strategy_bytes'] / 2 / 1e3:.1f} kB") in out_of_one
    )  # of both
    assert (
        sentences.OF_EVALUATION.format(
            method="ib_iumad", dataset="eyecandies", modality="rgb+depth", step=1, workdir="run"
        )
        in (home / "again" / "results.md").read_text()
    )
    assert out.endswith(sentences.EVALUATION_IS_IN.format("again") + "\n")
    assert (home / "again" / "report.html").exists()


def test_evaluate_tells_objects_apart_that_were_never_learned(home, command):
    code, out, err = command("evaluate", "--workdir=run", "--step=0", "--config.dataset.objects=GummyBear,CandyCane")
    assert code == 0, err
    (folder,) = (home / "run" / "evaluations").glob("*_step0")
    assert re.fullmatch("eyecandies_[0-9a-f]{8}_step0", folder.name)
    assert re.search(r"^GummyBear +[0-9.]+%$", out, re.MULTILINE)
    results, before = results_of(folder), results_of(home / "run")
    assert results["objects"] == ["CandyCane"]
    assert results["matrix"] == {metric: [rows[0][:1]] for metric, rows in before["matrix"].items()}
    assert set(results["unknown"]["objects"]) == {"GummyBear"}
    assert results["unknown"]["auroc_distance"] == 1
    assert "| GummyBear" in (folder / "results.md").read_text()
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    story = ["step", *["evaluation"] * 3, "decisions", "unknown", "snapshot"]
    assert [event["event"] for event in events] == story


def test_robustness_finds_what_the_run_did_where_nothing_is_wrong(home, command):
    code, out, err = command("robustness", "--workdir=run", f"--config.dataset.objects={','.join([*LEARNED, NEVER])}")
    assert code == 0, err
    head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in out.splitlines())
    found = {tuple(row[:2]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    results = results_of(home / "run")
    tested = [of_object["test"] for of_object in results["decisions"][-1]["objects"].values()]
    rates = ("false_alarms", "misses", "recognised")
    expected = {rate: f"{np.mean([of[rate] for of in tested]):.1%}" for rate in rates}
    untouched = found["none", ""]
    assert {rate: untouched[rate.replace("_", " ")] for rate in expected} == expected
    assert untouched["I-AUROC"] == f"{np.mean(results['matrix']['i_auroc'][-1]):.1%}"
    assert untouched["unknown (never learned)"] == "100.0%"
    assert float(found["noise, grey levels", "10"]["unknown"][:-1]) >= float(untouched["unknown"][:-1])
    assert {fault for fault, _ in found} == {"none", *FAULTS, "depth noise, mm"}


def test_evaluate_neither_takes_the_place_of_a_run_nor_judges_what_nothing_learned(home, command):
    before = (home / "run" / "ledger.jsonl").read_bytes(), (home / "run" / "results.json").read_bytes()
    code, out, err = command("evaluate", "--workdir=run", "--output=run")
    assert (code, out) == (2, "")
    assert err == (f"iumad_jax: {sentences.OUTPUT_IS_A_RUN.format('run')}\n")
    assert before == ((home / "run" / "ledger.jsonl").read_bytes(), (home / "run" / "results.json").read_bytes())
    code, out, err = command("export", "--workdir=run", "--output=run/config")
    assert (code, err) == (
        2,
        f"iumad_jax: {sentences.EXPORT_PLACE_WRONG.format('run/config')}\n",
    )
    flags = ("--step=0", "--config.dataset.objects=GummyBear", "--output=unlearned")
    code, out, err = command("evaluate", "--workdir=run", *flags)
    assert (code, out) == (2, "")
    assert (
        err.splitlines()[-1]
        == f"iumad_jax: {sentences.NONE_WAS_LEARNED.format(objects='GummyBear', learned='CandyCane')}"
    )
    assert not (home / "unlearned").exists()


ALONE = """
import sys
import numpy as np
images = [np.load(f"{name}.npy") for name in ("rgb", "depth")]
if sys.argv[1] == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession("detector.onnx")
    names = [one.name for one in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"rgb": images[0], "depth": images[1]})))
    assert "jax" not in sys.modules
else:
    import jax
    from jax import export
    found = export.deserialize(bytearray(open("detector.stablehlo", "rb").read())).call(*images)
assert "iumad_jax" not in sys.modules
np.savez("found.npz", **found)
"""


@pytest.mark.parametrize("format_", ["stablehlo", "onnx"])
def test_an_exported_file_runs_alone(home, command, detector, eyecandies_root, format_):
    """On real images of CandyCane, in a process that does not load this package."""
    real = samples(Eyecandies(eyecandies_root, "CandyCane"), "CandyCane")[:2]
    expected = detector(*stacked(real))
    for name, array in detector.prepare(*stacked(real)).items():
        np.save(home / f"{name}.npy", array)
    code, out, err = command(
        "export", "--workdir=run", f"--format={format_}", f"--output=detector.{format_}", "--batch=2"
    )
    assert code == 0, err
    assert out.startswith(f"detector.{format_}: ")
    described = json.loads((home / f"detector.{format_}.json").read_text())
    assert (described["format"], described["step"]) == (format_, 1)
    assert described["objects"] == list(LEARNED)
    assert described["inputs"] == {"rgb": [2, 64, 64, 3], "depth": [2, 64, 64, 3]}
    subprocess.run([sys.executable, "-c", ALONE, format_], cwd=home, check=True)
    with np.load(home / "found.npz") as found:
        assert set(found) == set(described["outputs"])
        scale = expected.map.max()
        np.testing.assert_allclose(found["map"], expected.map, atol=1e-4 * scale)
        np.testing.assert_allclose(found["score"], expected.score, rtol=1e-4)
        np.testing.assert_allclose(found["probability"], expected.probability, rtol=1e-3)
        np.testing.assert_allclose(found["distance"], expected.distance, rtol=1e-4)
        assert [LEARNED[index] for index in found["object_id"]] == expected.object.tolist()
        for field in ("anomalous", "unknown", "image_threshold", "pixel_threshold", "unknown_threshold"):
            np.testing.assert_allclose(found[field], getattr(expected, field))
        assert (found["mask"] != expected.mask).mean() < 1e-3


BAD_COMMANDS = {
    "no workdir": ("predict", ["--output=x"], sentences.FLAG_MISSING.format(flag="--workdir")),
    "no run there": ("evaluate", ["--workdir=candies"], sentences.NO_RUN_THERE.format("candies")),
    "no such step": (
        "evaluate",
        ["--workdir=run", "--step=7"],
        sentences.NO_SNAPSHOT_OF_STEP.format(step=7, known="0, 1"),
    ),
    "no such key": (
        "evaluate",
        ["--workdir=run", "--config.dataset.rot=x"],
        sentences.UNKNOWN_KEY.format(key="rot", meant="root"),
    ),
    "a key of training": (
        "evaluate",
        ["--workdir=run", "--config.seed=1"],
        sentences.TRAINING_KEY.format("--config.seed"),
    ),
    "no output": ("predict", ["--workdir=run"], sentences.OUTPUT_MISSING),
    "no depth": ("predict", ["--workdir=run", "--output=x", "--input=candies"], sentences.DEPTH_FLAG_MISSING),
    "no input": ("predict", ["--workdir=run", "--output=x", "--input=nix"], sentences.INPUT_NOT_THERE.format("nix")),
    "no such depth": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=nix"],
        sentences.DEPTH_NOT_THERE.format("nix"),
    ),
    "one depth for all": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=run/config.json"],
        sentences.DEPTH_OF_ONE_FILE.format(file="run/config.json", root="candies"),
    ),
    "no unit": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=candies", "--depth_unit=0"],
        sentences.DEPTH_UNIT_WRONG.format(0),
    ),
    "no camera": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=candies", "--camera=0,0,0,0"],
        sentences.CAMERA_FLAG_WRONG.format("0,0,0,0"),
    ),
    "output within input": (
        "predict",
        ["--workdir=run", "--output=candies/x", "--input=candies"],
        sentences.OUTPUT_WITHIN_INPUT.format("candies/x"),
    ),
    "nothing there": (
        "evaluate",
        ["--workdir=run", "--config.dataset.name=candies", "--config.dataset.root=x"],
        sentences.ROOT_NOT_A_FOLDER.format("x"),
    ),
    "no such format": ("export", ["--workdir=run", "--format=pb"], "flag --format=pb: value should be one of"),
    "no object": (
        "predict",
        ["--workdir=run", "--output=x", "--object=Bear"],
        sentences.NO_OBJECT_OF_MODEL.format("Bear"),
    ),
}


@pytest.mark.parametrize(("name", "flags", "told"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_mistakes_are_told_in_a_sentence(home, command, name, flags, told):
    code, out, err = command(name, *flags)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (home / "x").exists()


def test_a_run_without_a_finished_step(home, tmp_path):
    shutil.copy(home / "run" / "config.json", tmp_path)
    with pytest.raises(UserError, match=sentences.NO_SNAPSHOT_OF_ANY_STEP):
        snapshots.read(tmp_path)
