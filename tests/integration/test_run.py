"""The training command: from rendered images to results, interrupted and resumed."""

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.ledger import read
from tests import sentences
from tests.integration.conftest import SMALL, as_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # ml_collections reads a config
]

OBJECTS = ("CandyCane", "GummyBear")
METRICS = ("i_auroc", "p_auroc", "aupro", "p_auroc_object", "aupro_object")
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
KEYS = SMALL | {
    "dataset.name": "eyecandies",
    "dataset.root": "candies",
    "dataset.objects": ",".join(OBJECTS),
    "dataset.prepared": "prepared",
    "modality": "rgb",
    "backbone.grid": 4,
    "model.width": 16,
    "model.hidden": 16,
    "train.epochs": 6,
    "snapshots.every_minutes": 0.0,
    "continual.strategy": "iuf",  # has state within and between steps
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, candies):
    """Create a folder with candies."""
    home = tmp_path_factory.mktemp("home")
    candies(home / "candies", ",".join(OBJECTS), train=5, val=1, test=4)
    return home


def flags(workdir, protocol="1-1", **changes):
    return [f"--config={QUICKSTART}:{protocol}", f"--workdir={workdir}", *as_flags(KEYS | changes)]


@pytest.fixture(scope="module")
def start(home):
    """Return a function that starts the command with the small config and changes to it."""

    def start(workdir, protocol="1-1", stderr=subprocess.PIPE, **changes):
        return subprocess.Popen(
            [sys.executable, "-m", "iumad_jax.main", *flags(workdir, protocol, **changes)],
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def run(start):
    """Return a function that runs the command as a process, and returns exit code, standard output and error."""

    def run(*args, **changes):
        with start(*args, **changes) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    return run


@pytest.fixture
def run_here(command):
    """Return a function that runs the command in this process, which is faster, and returns the same as `run`."""
    return lambda *args, **changes: command("main", *flags(*args, **changes))


@pytest.fixture(scope="module")
def finished_run(run, tmp_path_factory):
    """Return the workdir and the output of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, out, err = run(workdir)
    assert code == 0, err
    workdir.with_name("stderr").write_text(err)
    return workdir, out


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_results_have_the_documented_form(finished_run):
    workdir, _ = finished_run
    results = results_of(workdir)
    required = {"config", "protocol", "objects", "steps", "matrix", "summary", "seconds", "versions"}
    required |= {"acts", "tested", "baselines", "bytes", "intervals", "kinds", "strategy_bytes", "decisions"}
    assert set(results) == required
    assert results["acts"] == [{"act": "learn", "objects": [name], "before": {}} for name in OBJECTS]
    assert results["tested"] == {}
    assert (results["protocol"], results["objects"]) == ("1-1", list(OBJECTS))
    assert results["steps"] == [["CandyCane"], ["GummyBear"]]
    assert {"format": workdirs.FORMAT} | results["config"] == json.loads((workdir / "config.json").read_text())
    assert results["config"]["train"]["epochs"] == 6
    assert results["seconds"] > 1
    assert results["strategy_bytes"] == 2 * 16**2 * 4  # second moments of one encoder and one decoder layer
    assert {"iumad-jax", "jax"} <= set(results["versions"])
    assert set(results["baselines"]) == {"feature_norm", "gaussian", "memory_bank"}
    for method in (results, *results["baselines"].values()):
        assert set(METRICS) <= set(method["matrix"]) == set(method["summary"])
        for metric, rows in method["matrix"].items():
            assert [[value is None for value in row] for row in rows] == [[False, True], [False, False]]
            (first, _), (again, second) = rows
            assert all(0 <= value <= 1 for value in (first, again, second))
            assert method["summary"][metric] == pytest.approx(
                {
                    "final": (again + second) / 2,
                    "acc": (first + (again + second) / 2) / 2,
                    "fm": first - again,
                    "fm_aggregate": first - (again + second) / 2,
                    "new": (first + second) / 2,
                }
            )


def test_the_ledger_records_all_events_in_order(finished_run):
    workdir, _ = finished_run
    events = read(workdir / "ledger.jsonl")
    kinds = [event["event"] for event in events]
    methods = 4
    assert kinds == [
        "step", *["epoch"] * 6, *["evaluation"] * methods, "decisions", "snapshot",
        "step", *["epoch"] * 6, *["evaluation"] * 2 * methods, "decisions", "snapshot",
    ]  # fmt: skip
    assert events[0] == {
        "event": "step",
        "step": 0,
        "act": "learn",
        "objects": ["CandyCane"],
        "images": 5,
        "changes": {},
    }
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [(event["step"], event["epoch"]) for event in epochs] == [(s, e) for s in (0, 1) for e in range(6)]
    for event in epochs:
        losses = {"fusion", "kl", "ib_heads", "object_rgb"} | ({"compression"} if event["step"] == 0 else set())
        assert set(event) == {"event", "step", "epoch", "loss", "gradient_norm", "update_norm"} | losses
        assert event["loss"] == pytest.approx(sum(event[name] for name in losses), rel=1e-4)
    assert epochs[5]["loss"] < epochs[0]["loss"]
    results = results_of(workdir)
    for event in events:
        if event["event"] == "evaluation":
            method = {"ib_iumad": results, **results["baselines"]}[event["method"]]
            column = OBJECTS.index(event["object"])
            for metric in METRICS:
                assert event[metric] == method["matrix"][metric][event["step"]][column]


def test_tables_and_pictures_are_written(finished_run):
    workdir, out = finished_run
    results, tables = results_of(workdir), (workdir / "results.md").read_text()
    for metric in METRICS:
        for column, name in enumerate(OBJECTS):
            value = f"{results['matrix'][metric][1][column]:.3f}"
            for text in (out, tables):
                rows = [line for line in text.splitlines() if line.lstrip("| ").startswith(name)]
                assert any(value in row for row in rows[1:])  # the first row is that of the decisions
    assert sentences.PICTURES_ARE_IN.format(workdir) in out
    assert out.endswith(f"{sentences.RESULTS_ARE_IN.format(workdir)}\n")
    pictures = {path.name for path in (workdir / "pictures").iterdir()}
    assert {"step0_CandyCane.jpg", "step1_CandyCane.jpg", "step1_GummyBear.jpg"} == {
        name for name in pictures if name.startswith("step")
    }
    assert {f"matrix_{metric}.png" for metric in METRICS} <= pictures
    assert {"report.html", "results.tex", "results.csv"} <= {path.name for path in workdir.iterdir()}
    assert OBJECTS[1] in (workdir / "report.html").read_text()
    for name in pictures:
        with Image.open(workdir / "pictures" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # not blank


def test_without_a_terminal_progress_is_printed_as_plain_lines(finished_run):
    workdir, _ = finished_run
    matrix = np.array(results_of(workdir)["matrix"]["i_auroc"], float)
    lines = workdir.with_name("stderr").read_text().split("\n")
    assert [line for line in lines if sentences.EPOCH_PART not in line] == [  # printed every half a minute
        sentences.STEP_BEGINS.format(step=0, objects="CandyCane", images=5),
        sentences.STEP_EVALUATED.format(step=0, learned=f"CandyCane {matrix[0, 0]:.3f}", mean=f"{matrix[0, 0]:.3f}"),
        sentences.STEP_BEGINS.format(step=1, objects="GummyBear", images=5),
        sentences.STEP_EVALUATED_WITH_OTHERS.format(
            step=1,
            learned=f"GummyBear {matrix[1, 1]:.3f}",
            change=f"CandyCane {matrix[1, 0] - matrix[0, 0]:+.3f}",
            mean=f"{matrix[1].mean():.3f}",
        ),
        "",
    ]


def test_on_a_terminal_bars_show_the_remaining_time(start, finished_run, tmp_path):
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    changes = {
        "dataset.objects": "CandyCane",
        "dataset.prepared": str(tmp_path / "prepared"),
        "report.tensorboard": True,
    }
    output = b""
    with start(tmp_path / "run", "1-0", stderr=terminal, **changes) as process:
        os.close(terminal)
        with suppress(OSError):  # EIO: the process closed the terminal
            while data := os.read(reader, 4096):
                output += data
    os.close(reader)
    assert process.returncode == 0
    text = output.decode()
    for name, unit in sentences.BARS:
        bar = name.format(object="CandyCane", split="train")
        assert re.search(rf"\r{bar}: .*<\d\d:\d\d, .*{unit}", text) or re.search(rf"\r{bar}: +0%\|", text)
    assert re.search(
        rf"\r{sentences.BAR_OF_TRAINING}: .*\[\d\d:\d\d<\d\d:\d\d, .*loss=", text
    )  # remaining time, and the loss
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_live_file_has_the_events_of_the_ledger_with_their_times(finished_run):
    workdir, _ = finished_run
    ledger, live = read(workdir / "ledger.jsonl"), read(workdir / "live.jsonl")
    for event, live_event in zip(ledger, live, strict=True):
        assert event.items() <= live_event.items()
        assert set(live_event) - set(event) == {"time"} | (
            {"learning_rate", "images_per_second"} if event["event"] == "epoch" else set()
        )


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None
        time.sleep(0.005)


def stop(process, number):
    """Send a signal, require exit code 75 within 10 seconds and return the last lines of standard error."""
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate()
    assert time.monotonic() - start < 10
    assert (process.returncode, out) == (75, ""), err
    return err.splitlines()


def test_a_stopped_run_saves_and_ends_like_an_uninterrupted_run(start, run, finished_run, tmp_path):
    """It is stopped during preparation, within an epoch and during evaluation, between its rare snapshots."""
    workdir, prepared = tmp_path / "run", tmp_path / "prepared"
    changes = {"snapshots.every_minutes": 5.0, "dataset.prepared": str(prepared)}
    ledger, folder = workdir / "ledger.jsonl", workdir / "snapshots_within_step"

    def saved_updates():
        return [int(path.name) for path in folder.glob("*[0-9]") if path.is_dir()]

    with start(workdir, **changes) as process:
        wait_until(process, prepared.exists)
        *_, last = stop(process, signal.SIGTERM)
    assert last == (f"iumad_jax: {sentences.STOPPING_WITH_SIGINT.format('SIGTERM')}")
    assert not saved_updates()
    with start(workdir, **changes) as process:
        wait_until(process, lambda: ledger.exists() and '"epoch": 1' in ledger.read_text())
        assert any(sentences.STOPPING.format("SIGINT") in line for line in stop(process, signal.SIGINT))
    assert len(saved_updates()) == 1  # a snapshot of the last update; the ledger has whole epochs only
    assert saved_updates()[0] // 2 + 1 == len(read(ledger))
    with start(workdir, **changes) as process:
        wait_until(process, lambda: read(ledger)[-1]["event"] == "evaluation")
        stop(process, signal.SIGTERM)
    assert 12 in saved_updates()
    code, _, err = run(workdir, **changes)
    assert code == 0, err
    assert sentences.GOING_ON.format(step=0, updates=12, all=12) in err
    assert ledger.read_bytes() == (finished_run[0] / "ledger.jsonl").read_bytes()


def test_a_second_sigint_ends_a_run_at_once(start, tmp_path):
    with start(tmp_path / "run") as process:
        assert process.stderr.readline().startswith(
            sentences.STEP_BEGINS_PART.format(0)
        )  # compilation follows, which does not react to signals
        process.send_signal(signal.SIGINT)
        assert sentences.STOPPING_PART.format("SIGINT") in process.stderr.readline()
        start_time = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert time.monotonic() - start_time < 2


def test_a_finished_run_is_reported_and_its_results_are_printed_again(run_here, finished_run):
    workdir, out = finished_run
    before = times_of_files(workdir)
    code, repeated, err = run_here(workdir)
    assert code == 0, err
    assert repeated == f"{sentences.RUN_FINISHED.format(workdir)}\n{out}"
    assert times_of_files(workdir) == before


@pytest.mark.parametrize("with_dataset", [True, False], ids=["with the dataset", "without the dataset"])
def test_removed_results_are_rewritten_from_the_workdir(run_here, home, finished_run, tmp_path, with_dataset):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run[0], workdir)
    contents = {
        name: (workdir / name).read_bytes() for name in ("results.md", "ledger.jsonl", "pictures/matrix_aupro.png")
    }
    for name in ("results.md", "report.html", "pictures/matrix_aupro.png"):
        (workdir / name).unlink()
    for folder in () if with_dataset else ("candies", "prepared"):
        (home / folder).rename(home / f"{folder} elsewhere")
    code, out, err = run_here(workdir)
    for folder in () if with_dataset else ("candies", "prepared"):
        (home / f"{folder} elsewhere").rename(home / folder)
    assert code == 0, err
    assert sentences.RUN_FINISHED_PART not in out
    assert (sentences.DATASET_MISSING_PART.format("candies") in err) != with_dataset
    assert {name: (workdir / name).read_bytes() for name in contents} == contents
    assert (workdir / "report.html").stat().st_size == pytest.approx(
        (finished_run[0] / "report.html").stat().st_size, abs=50
    )


def test_another_config_in_the_same_workdir_is_refused(run_here, finished_run):
    workdir, _ = finished_run
    before = times_of_files(workdir)
    code, out, err = run_here(workdir, seed=1, **{"train.epochs": 7})
    assert (code, out) == (2, "")
    assert err.startswith(f"iumad_jax: {sentences.WORKDIR_OF_ANOTHER_CONFIG.format(workdir)}")
    assert sentences.KEY_DIFFERS.format(key="config.seed", stored=0, now=1) in err
    assert sentences.KEY_DIFFERS.format(key="config.train.epochs", stored=6, now=7) in err
    assert err.count("\n") == 1
    assert times_of_files(workdir) == before


def test_a_full_disk_stops_the_run(start, finished_run, tmp_path):
    """The disk has room for the ledger but not for a snapshot."""
    workdir = tmp_path / "run"
    with start(workdir) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    folder = workdir / "snapshots_within_step"
    assert err.splitlines(keepends=True)[-1] == (
        f"iumad_jax: {sentences.SNAPSHOT_NOT_SAVED.format(folder=folder, reason='File too large')}\n"
    )
    assert not any(path.name.isdigit() for path in folder.iterdir())


@pytest.mark.parametrize(("modality", "method"), [("rgb+depth", "ib_iumad"), ("depth", "feature_norm")])
def test_other_modalities_and_methods(run, finished_run, tmp_path, modality, method):
    workdir = tmp_path / "run"
    changes = {"dataset.objects": "CandyCane", "train.epochs": 1, "modality": modality, "method": method}
    code, _, err = run(workdir, "1-0", **changes)
    assert code == 0, err
    results, trained = results_of(workdir), method == "ib_iumad"
    epochs = [set(event) for event in read(workdir / "ledger.jsonl") if event["event"] == "epoch"]
    terms = {"loss", "fusion", "kl", "ib_heads", "object_rgb", "object_depth", "compression"}
    terms |= {"gradient_norm", "update_norm"}
    assert epochs == ([{"event", "step", "epoch"} | terms] if trained else [])
    assert set(results["baselines"]) == {"feature_norm", "gaussian", "memory_bank"} - {method}
    for metric in METRICS:
        ((value,),) = results["matrix"][metric]
        assert 0 <= value <= 1
        assert results["summary"][metric] == {
            "final": value, "acc": value, "fm": None, "fm_aggregate": None, "new": value
        }  # fmt: skip
    depth_aupro = (results["baselines"]["feature_norm"] if trained else results)["matrix"]["aupro"][0][0]
    assert depth_aupro != results_of(finished_run[0])["baselines"]["feature_norm"]["matrix"]["aupro"][0][0]


def test_joint_trains_on_all_objects_learned_so_far_and_is_reported_as_not_incremental(run, command, tmp_path):
    workdir, changes = tmp_path / "run", {"method": "iuf", "model.class_grid": 8, "train.epochs": 1}
    code, out, err = run(workdir, **changes, **{"continual.strategy": "joint"})
    assert code == 0, err
    events = read(workdir / "ledger.jsonl")
    assert [event["images"] for event in events if event["event"] == "step"] == [5, 10]
    assert [event["objects"] for event in events if event["event"] == "step"] == [["CandyCane"], ["GummyBear"]]
    for text in (out, (workdir / "results.md").read_text()):
        assert sentences.STRATEGY_JOINT in text
    image_bytes = 64 * 64 * 3 * 4 + 4 * 4 * 192 * 4 + 4  # prepared pixels, features and the object's number
    assert 0 < results_of(workdir)["strategy_bytes"] <= 10 * image_bytes
    folder = workdir / "evaluations"
    for step in (0, 1):
        output = folder / str(step)
        assert command("evaluate", f"--workdir={workdir}", f"--step={step}", f"--output={output}")[0] == 0
    stored = [results_of(folder / str(step))["strategy_bytes"] for step in (0, 1)]
    assert stored == [results_of(workdir)["strategy_bytes"] // 2, results_of(workdir)["strategy_bytes"]]


def test_a_loss_that_is_not_finite_stops_the_run(run, finished_run, tmp_path):
    code, out, err = run(tmp_path / "run", **{"train.learning_rate": 1e30, "train.schedule": "step"})
    assert (code, out) == (2, "")
    *_, last = err.splitlines()
    cause = sentences.UPDATE_NOT_FINITE.format(value="inf")
    message = sentences.IN_STEP.format(what=cause, step=0, epoch=0, update=0, images="CandyCane/")
    assert last.startswith(f"iumad_jax: {message}")
    assert sentences.TRAINING_STOPPED in last
    assert [event["event"] for event in read(tmp_path / "run" / "ledger.jsonl")] == ["step"]
