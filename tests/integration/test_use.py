"""Commands that use a trained model: predict, evaluate, export, robustness, choose. All tests share one run."""

import csv
import dataclasses
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from iumad_jax import choose, evaluate, predict, robustness
from iumad_jax.data import readers
from iumad_jax.data.degradation import FAULTS
from iumad_jax.data.prepared.store import open_store
from iumad_jax.data.readers import unlabelled
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.readers.folder import Folder
from iumad_jax.errors import UserError
from iumad_jax.export import __main__ as export
from iumad_jax.inference import choosing, predictions, unknown_images
from iumad_jax.runtime import snapshots, workdir
from tests import sentences
from tests.integration.trained import LEARNED, NEVER_LEARNED, in_process, results_of, samples, stacked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture
def command(home, capsys, monkeypatch):
    """Run a command in this process, which is faster, and return its exit code, standard output and standard error."""
    monkeypatch.chdir(home)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", arguments := ["command", *flags])  # ml_collections reads the keys from here
        commands = {"predict": predict, "evaluate": evaluate, "robustness": robustness, "choose": choose}
        code = (commands | {"export": export})[name].main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


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


def test_a_failed_evaluation_keeps_earlier_results(home, command):
    shutil.copytree(home / "candies", home / "damaged")
    flags = ["--workdir=run", "--output=before", "--config.dataset.root=damaged"]
    assert command("evaluate", *flags)[0] == 0
    before = {path: path.read_bytes() for path in (home / "before").rglob("*") if path.is_file()}
    (home / "damaged" / "GummyBear" / "test_public" / "data" / "03_image_4.png").write_bytes(b"")
    assert command("evaluate", *flags)[0] == 2
    assert {path: path.read_bytes() for path in (home / "before").rglob("*") if path.is_file()} == before


def test_predictions_before_the_disk_was_full_are_listed(home, command, files_no_larger_than, monkeypatch):
    flags = ["--workdir=run", "--output=cut", f"--config.dataset.objects={NEVER_LEARNED}"]
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
            assert dataclasses.astuple(read.camera) == (88, 89, 31, 32, False)
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
    assert evaluation["evaluated"] == {"workdir": "run", "step": 1, "learned": 2}
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
    code, out, err = command(
        "export", "--workdir=run", f"--format={format_}", f"--output=detector.{format_}", "--batch=2"
    )
    assert code == 0, err
    assert out.startswith(f"detector.{format_}: ")
    description = json.loads((home / f"detector.{format_}.json").read_text())
    assert (description["format"], description["step"]) == (format_, 1)
    assert description["objects"] == list(LEARNED)
    assert description["inputs"] == {"rgb": [2, 64, 64, 3], "depth": [2, 64, 64, 3]}
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
