"""Commands that use a trained model: predict, evaluate, export, robustness, choose. All tests share one run."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from iumad_jax import Detector
from iumad_jax.data import readers
from iumad_jax.data.degradation import FAULTS
from iumad_jax.data.prepared.store import open_store
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.errors import UserError
from iumad_jax.export import formats
from iumad_jax.inference import choosing
from iumad_jax.runtime import snapshots, workdir
from tests import sentences
from tests.integration.trained import LEARNED, NEVER_LEARNED, results_of, samples, stacked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


def test_a_failed_evaluation_keeps_earlier_results(home, command):
    shutil.copytree(home / "candies", home / "damaged")
    flags = ["--workdir=run", "--output=before", "--config.dataset.root=damaged"]
    assert command("evaluate", *flags)[0] == 0
    before = {path: path.read_bytes() for path in (home / "before").rglob("*") if path.is_file()}
    (home / "damaged" / "GummyBear" / "test_public" / "data" / "03_image_4.png").write_bytes(b"")
    assert command("evaluate", *flags)[0] == 2
    assert {path: path.read_bytes() for path in (home / "before").rglob("*") if path.is_file()} == before


def test_evaluate_repeats_the_results_of_training(home, command):
    code, out, err = command("evaluate", "--workdir=run", "--output=again")
    assert code == 0, err
    results, evaluation = results_of(home / "run"), results_of(home / "again")
    assert evaluation["matrix"] == {metric: [rows[-1]] for metric, rows in results["matrix"].items()}
    for name, baseline in results["baselines"].items():
        last_rows = {metric: [rows[-1]] for metric, rows in baseline["matrix"].items()}
        assert evaluation["baselines"][name]["matrix"] == last_rows
    assert evaluation["decisions"] == results["decisions"][-1:]
    assert command("evaluate", "--workdir=run")[1].endswith(
        sentences.RESULTS_ARE_IN.format("run/evaluations/eyecandies_step1") + "\n"
    )
    steps = {"CandyCane": 0, "GummyBear": 1}
    assert evaluation["evaluated"] == {"workdir": "run", "step": 1, "learned": 2, "steps": steps}
    assert {name: re.search(rf"^{name} +(\d) ", out, re.MULTILINE)[1] for name in steps} == {
        "CandyCane": "0",
        "GummyBear": "1",
    }
    output = command("evaluate", "--workdir=run", "--output=one", "--config.dataset.objects=CandyCane")[1]
    per_object = f"{results['strategy_bytes'] / 2 / 1e3:.1f} kB"  # the strategy stores both learned objects
    assert sentences.STRATEGY_STORES_PART.format(per_object) in output
    assert (
        sentences.TITLE_OF_EVALUATION.format(
            method="ib_iumad", dataset="eyecandies", modality="rgb+depth", step=1, workdir="run"
        )
        in (home / "again" / "results.md").read_text()
    )
    assert out.endswith(sentences.EVALUATION_IS_IN.format("again") + "\n")
    assert (home / "again" / "report.html").exists()


def test_evaluate_reports_objects_that_were_never_learned_separately(home, command):
    code, out, err = command("evaluate", "--workdir=run", "--step=0", "--config.dataset.objects=GummyBear,CandyCane")
    assert code == 0, err
    (folder,) = (home / "run" / "evaluations").glob("*_step0")
    assert re.fullmatch("eyecandies_[0-9a-f]{8}_step0", folder.name)
    assert re.search(r"^GummyBear +[0-9.]+%$", out, re.MULTILINE)
    evaluation, results = results_of(folder), results_of(home / "run")
    assert evaluation["objects"] == ["CandyCane"]
    assert evaluation["matrix"] == {metric: [rows[0][:1]] for metric, rows in results["matrix"].items()}
    assert set(evaluation["unknown"]["objects"]) == {"GummyBear"}
    assert evaluation["unknown"]["auroc_distance"] == 1
    assert "| GummyBear" in (folder / "results.md").read_text()
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    kinds = ["step", *["evaluation"] * 3, "decisions", "unknown", "snapshot"]
    assert [event["event"] for event in events] == kinds


def test_robustness_repeats_the_results_of_the_run_on_unchanged_images(home, command):
    code, out, err = command(
        "robustness", "--workdir=run", f"--config.dataset.objects={','.join([*LEARNED, NEVER_LEARNED])}"
    )
    assert code == 0, err
    head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in out.splitlines())
    cells = {tuple(row[:2]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    results = results_of(home / "run")
    tests = [decisions["test"] for decisions in results["decisions"][-1]["objects"].values()]
    rates = ("false_alarms", "misses", "recognised")
    expected = {rate: f"{np.mean([test[rate] for test in tests]):.1%}" for rate in rates}
    unchanged = cells["none", ""]
    assert {rate: unchanged[rate.replace("_", " ")] for rate in expected} == expected
    assert unchanged["I-AUROC"] == f"{np.mean(results['matrix']['i_auroc'][-1]):.1%}"
    assert unchanged["unknown (never learned)"] == "100.0%"
    assert float(cells["noise, grey levels", "10"]["unknown"][:-1]) >= float(unchanged["unknown"][:-1])
    assert {fault for fault, _ in cells} == {"none", *FAULTS, "depth noise, mm"}


def test_choose_lists_every_setting_once_and_the_best_first(command):
    code, out, err = command("choose", "--workdir=run", "--images=2", "--defects=2")
    assert code == 0, err
    header, _, *rows = (re.split(r" *\| *", line)[1:-1] for line in out.splitlines())
    assert header == ["run", "method", "combine", "score", "I-AUROC", "AUPRO", "object P-AUROC"]
    assert len(rows) == len({tuple(row[:4]) for row in rows}) == 3 * 5 * 3
    means = [np.mean([float(value) for value in row[4:]]) for row in rows]
    assert all(first > second - 1e-3 for first, second in itertools.pairwise(means))  # printed with three digits


def test_synthetic_defects_differ_from_their_originals_within_the_mask(home, monkeypatch):
    monkeypatch.chdir(home)
    config = workdir.read(home / "run")
    store = open_store(config, readers.open_reader(config), home / "run")
    made, good = (
        choosing.make_images(store, "CandyCane", images=3, defects=3, seed=0),
        store.get("CandyCane", "calibration"),
    )
    assert len(made.mask) == 3 + 9
    assert not made.mask[:3].any()
    assert made.mask[3:].any((1, 2)).mean() > 0.8
    assert (made.mask & ~made.object).mean() < 1e-3
    pixels = (2 * np.arange(64) + 1) * 224 // 128  # of the mask, of which the prepared images show every few
    for m, images in made.batch.images.items():
        np.testing.assert_array_equal(images[:3], good.batch.images[m])
        np.testing.assert_array_equal(made.batch.features[m][:3], good.batch.features[m])
        np.testing.assert_array_equal(made.batch.features[m][3:], store.encode_images({m: images[3:]})[m])
        changed = (images[3:] != np.tile(images[:3], (3, 1, 1, 1))).any(-1)
        near = made.mask[3:] | np.roll(made.mask[3:], 3, 1) | np.roll(made.mask[3:], 3, 2)
        assert 0 < (changed & near[:, pixels[:, None], pixels]).sum() == changed.sum()


def test_evaluate_neither_overwrites_a_run_nor_evaluates_unlearned_objects_alone(home, command):
    before = (home / "run" / "ledger.jsonl").read_bytes(), (home / "run" / "results.json").read_bytes()
    code, out, err = command("evaluate", "--workdir=run", "--output=run")
    assert (code, out) == (2, "")
    assert err == (f"iumad_jax: {sentences.OUTPUT_IS_A_RUN.format('run')}\n")
    assert before == ((home / "run" / "ledger.jsonl").read_bytes(), (home / "run" / "results.json").read_bytes())
    code, out, err = command("export", "--workdir=run", "--output=run/config")
    assert (code, err) == (
        2,
        f"iumad_jax: {sentences.EXPORT_PATH_WRONG.format('run/config')}\n",
    )
    flags = ("--step=0", "--config.dataset.objects=GummyBear", "--output=unlearned")
    code, out, err = command("evaluate", "--workdir=run", *flags)
    assert (code, out) == (2, "")
    assert (
        err.splitlines()[-1]
        == f"iumad_jax: {sentences.NO_OBJECT_LEARNED.format(objects='GummyBear', learned='CandyCane')}"
    )
    assert not (home / "unlearned").exists()


SCRIPT = """
import sys
import numpy as np
images = [np.load(f"{name}.npy") for name in ("rgb", "depth")]
if sys.argv[1] == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession("detector.onnx")
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"rgb": images[0], "depth": images[1]})))
    assert "jax" not in sys.modules
else:
    import jax
    from jax import export
    outputs = export.deserialize(bytearray(open("detector.stablehlo", "rb").read())).call(*images)
assert "iumad_jax" not in sys.modules
np.savez("outputs.npz", **outputs)
"""


@pytest.mark.parametrize("format_", ["stablehlo", "onnx"])
def test_an_exported_file_runs_without_this_package(home, command, detector, eyecandies_root, format_):
    """It predicts real images of CandyCane in a process that does not load iumad_jax."""
    real = samples(Eyecandies(eyecandies_root, "CandyCane"), "CandyCane")[:2]
    expected = detector(*stacked(real))
    for name, array in detector.prepare(*stacked(real)).items():
        np.save(home / f"{name}.npy", array)
    batch = ["--batch=2"] if format_ == "stablehlo" else []
    code, out, err = command("export", "--workdir=run", f"--format={format_}", f"--output=detector.{format_}", *batch)
    assert code == 0, err
    assert out.startswith(f"detector.{format_}: ")
    description = json.loads((home / f"detector.{format_}.json").read_text())
    assert (description["format"], description["step"]) == (format_, 1)
    assert description["objects"] == list(LEARNED)
    images = 2 if batch else "batch"
    assert description["inputs"] == {"rgb": [images, 64, 64, 3], "depth": [images, 64, 64, 3]}
    subprocess.run([sys.executable, "-c", SCRIPT, format_], cwd=home, check=True)
    with np.load(home / "outputs.npz") as outputs:
        assert set(outputs) == set(description["outputs"])
        scale = expected.map.max()
        np.testing.assert_allclose(outputs["map"], expected.map, atol=1e-4 * scale)
        np.testing.assert_allclose(outputs["score"], expected.score, rtol=1e-4)
        np.testing.assert_allclose(outputs["probability"], expected.probability, rtol=1e-3)
        np.testing.assert_allclose(outputs["distance"], expected.distance, rtol=1e-4)
        assert [LEARNED[index] for index in outputs["object_id"]] == expected.object.tolist()
        for field in ("anomalous", "unknown", "image_threshold", "pixel_threshold", "unknown_threshold"):
            np.testing.assert_allclose(outputs[field], getattr(expected, field))
        assert (outputs["mask"] != expected.mask).mean() < 1e-3


@pytest.fixture(scope="module")
def onnx_model(home):
    """Return the content of an exported file."""
    detector = Detector.load(home / "run", **{"model.scan": formats.SCANS["onnx"]})
    return formats.export(detector, "onnx", None)


def assert_as_detected(run, detector, reader):
    """Compare a function from batches of images to outputs with detections of single images."""
    images = samples(reader, "CandyCane") + samples(reader, NEVER_LEARNED)
    singles = [detector(image.rgb, image.depth) for image in images]
    for count in (1, 3, 16):
        rows = np.arange(count) % len(images)
        outputs = run(*detector.prepare(*stacked([images[row] for row in rows])).values())
        expected = {field: np.stack([getattr(singles[row], field) for row in rows]) for field in ("score", "map")}
        np.testing.assert_allclose(outputs["score"], expected["score"], rtol=1e-4)
        np.testing.assert_allclose(outputs["map"], expected["map"], atol=1e-4 * expected["map"].max())
        assert outputs["unknown"].tolist() == [bool(singles[row].unknown) for row in rows]


def test_an_exported_model_takes_batches_of_any_size(onnx_model, detector, reader):
    run = formats.load_function(onnx_model, "onnx")
    assert_as_detected(lambda *images: run(*images)._asdict(), detector, reader)


def test_openvino_reads_an_exported_model(onnx_model, detector, reader, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    (tmp_path / "detector.onnx").write_bytes(onnx_model)
    model = openvino.Core().compile_model(tmp_path / "detector.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_as_detected(lambda *images: model(list(images)), detector, reader)


BAD_COMMANDS = {
    "a missing workdir": ("predict", ["--output=x"], sentences.FLAG_MISSING.format(flag="--workdir")),
    "a folder without a run": ("evaluate", ["--workdir=candies"], sentences.NO_RUN_IN_WORKDIR.format("candies")),
    "a step without a snapshot": (
        "evaluate",
        ["--workdir=run", "--step=7"],
        sentences.NO_SNAPSHOT_OF_STEP.format(step=7, known="0, 1"),
    ),
    "an unknown key": (
        "evaluate",
        ["--workdir=run", "--config.dataset.rot=x"],
        sentences.UNKNOWN_KEY.format(key="rot", meant="root"),
    ),
    "a key of training": (
        "evaluate",
        ["--workdir=run", "--config.seed=1"],
        sentences.TRAINING_KEY.format("--config.seed"),
    ),
    "a missing output": ("predict", ["--workdir=run"], sentences.OUTPUT_MISSING),
    "a missing depth flag": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies"],
        sentences.DEPTH_FLAG_MISSING,
    ),
    "an input that does not exist": (
        "predict",
        ["--workdir=run", "--output=x", "--input=nix"],
        sentences.INPUT_MISSING.format("nix"),
    ),
    "a depth folder that does not exist": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=nix"],
        sentences.DEPTH_MISSING.format("nix"),
    ),
    "one depth file for a folder": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=run/config.json"],
        sentences.DEPTH_OF_ONE_FILE.format(file="run/config.json", root="candies"),
    ),
    "a depth unit of 0": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=candies", "--depth_unit=0"],
        sentences.DEPTH_UNIT_WRONG.format(0),
    ),
    "a camera of zeros": (
        "predict",
        ["--workdir=run", "--output=x", "--input=candies", "--depth=candies", "--camera=0,0,0,0"],
        sentences.CAMERA_FLAG_WRONG.format("0,0,0,0"),
    ),
    "output within input": (
        "predict",
        ["--workdir=run", "--output=candies/x", "--input=candies"],
        sentences.OUTPUT_WITHIN_INPUT.format("candies/x"),
    ),
    "a root that does not exist": (
        "evaluate",
        ["--workdir=run", "--config.dataset.name=candies", "--config.dataset.root=x"],
        sentences.ROOT_NOT_A_FOLDER.format("x"),
    ),
    "no run to choose from": ("choose", ["--workdir=run,x"], sentences.NO_RUN_IN_WORKDIR.format("x")),
    "an unknown format": ("export", ["--workdir=run", "--format=pb"], "flag --format=pb: value should be one of"),
    "an unknown object": (
        "predict",
        ["--workdir=run", "--output=x", "--object=Bear"],
        sentences.NO_OBJECT_OF_MODEL.format("Bear"),
    ),
}


@pytest.mark.parametrize(("name", "flags", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_mistakes_are_reported_in_a_sentence(home, command, name, flags, message):
    code, out, err = command(name, *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (home / "x").exists()


def test_a_run_without_a_finished_step(home, tmp_path):
    shutil.copy(home / "run" / "config.json", tmp_path)
    with pytest.raises(UserError, match=sentences.NO_SNAPSHOT_OF_ANY_STEP):
        snapshots.read(tmp_path)
    with pytest.raises(UserError, match=sentences.NO_WORKDIR.format("absent")):
        Detector.load(tmp_path / "absent")
