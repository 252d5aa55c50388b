"""The command as a user runs it: a process, from rendered files to results, stopped and started again."""

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

from iumad_jax.data.candies import render
from iumad_jax.runtime.ledger import read
from tests import sentences
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.slow

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
    "continual.strategy": "iuf",  # which has memory of every kind: within a step, and between steps
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with candies."""
    home = tmp_path_factory.mktemp("home")
    render(home / "candies", train=5, val=1, test=4, size=64, objects=",".join(OBJECTS), progress=False)
    return home


@pytest.fixture(scope="module")
def start(home):
    """Starts the command in a folder of its own, with the quickstart's config made small and then changed."""

    def start(workdir, protocol="1-1", stderr=subprocess.PIPE, **changes):
        keys = KEYS | changes
        flags = [f"--config={QUICKSTART}:{protocol}", f"--workdir={workdir}"]
        return subprocess.Popen(
            [sys.executable, "-m", "iumad_jax.main", *flags, *(f"--config.{key}={keys[key]}" for key in keys)],
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def run(start):
    """Runs the command to its end: exit code, standard output, standard error."""

    def run(*args, **changes):
        with start(*args, **changes) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The workdir and the output of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run(workdir)
    assert code == 0, err
    workdir.with_name("stderr").write_text(err)
    return workdir, out


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_results_have_the_public_form(whole):
    workdir, _ = whole
    results = results_of(workdir)
    public = {"config", "protocol", "objects", "steps", "matrix", "summary", "seconds", "versions"}
    assert set(results) == public | {"baselines", "bytes", "strategy_bytes", "decisions"}
    assert (results["protocol"], results["objects"]) == ("1-1", list(OBJECTS))
    assert results["steps"] == [["CandyCane"], ["GummyBear"]]
    assert {"format": 3} | results["config"] == json.loads((workdir / "config.json").read_text())
    assert results["config"]["train"]["epochs"] == 6
    assert results["seconds"] > 1
    assert results["strategy_bytes"] == 2 * 16**2 * 4  # second moments of one encoder and one decoder layer
    assert {"iumad-jax", "jax"} <= set(results["versions"])
    assert set(results["baselines"]) == {"feature_norm", "nearest_neighbours"}
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


def test_the_ledger_tells_the_story_in_order(whole):
    workdir, _ = whole
    events = read(workdir / "ledger.jsonl")
    story = [event["event"] for event in events]
    methods = 3
    assert story == [
        "step", *["epoch"] * 6, *["evaluation"] * methods, "decisions", "snapshot",
        "step", *["epoch"] * 6, *["evaluation"] * 2 * methods, "decisions", "snapshot",
    ]  # fmt: skip
    assert events[0] == {"event": "step", "step": 0, "learned": ["CandyCane"], "images": 5}
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


def test_tables_and_pictures_are_there(whole):
    workdir, out = whole
    results, tables = results_of(workdir), (workdir / "results.md").read_text()
    for metric in METRICS:
        for column, name in enumerate(OBJECTS):
            value = f"{results['matrix'][metric][1][column]:.3f}"
            for text in (out, tables):
                assert value in next(line for line in text.splitlines() if line.lstrip("| ").startswith(name))
    assert out.endswith(f"{sentences.PICTURES_ARE_IN.format(workdir)}\n")
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


def test_where_there_is_no_terminal_a_few_plain_lines_tell_how_far_it_is(whole):
    workdir, _ = whole
    of_step = [np.nanmean(np.array(row, float)) for row in results_of(workdir)["matrix"]["i_auroc"]]
    lines = workdir.with_name("stderr").read_text().split("\n")
    assert [line for line in lines if sentences.EPOCH_SHORTLY not in line] == [  # which comes every half a minute
        sentences.STEP_BEGINS.format(step=0, objects="CandyCane", images=5),
        sentences.STEP_EVALUATED.format(step=0, mean=f"{of_step[0]:.3f}"),
        sentences.STEP_BEGINS.format(step=1, objects="GummyBear", images=5),
        sentences.STEP_EVALUATED.format(step=1, mean=f"{of_step[1]:.3f}"),
        "",
    ]


def test_on_a_terminal_bars_tell_how_much_time_is_left(start, whole, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    changes = {
        "dataset.objects": "CandyCane",
        "dataset.prepared": str(tmp_path / "prepared"),
        "report.tensorboard": True,
    }
    shown = b""
    with start(tmp_path / "run", "1-0", stderr=theirs, **changes) as process:
        os.close(theirs)
        with suppress(OSError):  # EIO: the other end was closed
            while more := os.read(ours, 4096):
                shown += more
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    for name, unit in sentences.BARS:
        bar = name.format(object="CandyCane", split="train")
        assert re.search(rf"\r{bar}: .*<\d\d:\d\d, .*{unit}", text) or re.search(rf"\r{bar}: +0%\|", text)
    assert re.search(
        rf"\r{sentences.BAR_OF_TRAINING}: .*\[\d\d:\d\d<\d\d:\d\d, .*loss=", text
    )  # time left, and the loss
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_live_view_tells_the_same_as_the_ledger_with_the_time(whole):
    workdir, _ = whole
    kept, live = read(workdir / "ledger.jsonl"), read(workdir / "live.jsonl")
    for event, shown in zip(kept, live, strict=True):
        assert event.items() <= shown.items()
        assert set(shown) - set(event) == {"time"} | (
            {"learning_rate", "images_per_second"} if event["event"] == "epoch" else set()
        )


def wait_until(process, happened):
    while not happened():
        assert process.poll() is None
        time.sleep(0.005)


def asked_to_stop(process, number):
    """Sends a signal and returns what the process still said; it has to end with 75 within 10 seconds."""
    asked = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate()
    assert time.monotonic() - asked < 10
    assert (process.returncode, out) == (75, ""), err
    return err.splitlines()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_nothing_had_been(start, run, whole, tmp_path):
    """While it prepares, in the middle of an epoch and while it evaluates, though snapshots are taken rarely."""
    workdir, prepared = tmp_path / "run", tmp_path / "prepared"
    rarely = {"snapshots.every_minutes": 5.0, "dataset.prepared": str(prepared)}
    ledger, within = workdir / "ledger.jsonl", workdir / "snapshots_within_step"

    def updates():
        return [int(path.name) for path in within.glob("*[0-9]") if path.is_dir()]

    with start(workdir, **rarely) as process:
        wait_until(process, prepared.exists)
        *_, last = asked_to_stop(process, signal.SIGTERM)
    assert last == (f"iumad_jax: {sentences.STOPPING_AND_AGAIN.format('SIGTERM')}")
    assert not updates()
    with start(workdir, **rarely) as process:
        wait_until(process, lambda: ledger.exists() and '"epoch": 1' in ledger.read_text())
        assert any(sentences.STOPPING.format("SIGINT") in line for line in asked_to_stop(process, signal.SIGINT))
    assert len(updates()) == 1  # where it was: losses are told of whole epochs, and all updates are kept
    assert updates()[0] // 2 + 1 == len(read(ledger))
    with start(workdir, **rarely) as process:
        wait_until(process, lambda: read(ledger)[-1]["event"] == "evaluation")
        asked_to_stop(process, signal.SIGTERM)
    assert 12 in updates()
    code, _, err = run(workdir, **rarely)
    assert code == 0, err
    assert ledger.read_bytes() == (whole[0] / "ledger.jsonl").read_bytes()


def test_a_second_sigint_ends_a_run_at_once(start, tmp_path):
    with start(tmp_path / "run") as process:
        assert process.stderr.readline().startswith(
            sentences.STEP_BEGINS_SHORTLY.format(0)
        )  # compiles next, and does not look up
        process.send_signal(signal.SIGINT)
        assert sentences.STOPPING_SHORTLY.format("SIGINT") in process.stderr.readline()
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert time.monotonic() - asked < 2


def test_a_finished_run_says_so_and_prints_its_result_again(run, whole):
    workdir, out = whole
    before = files(workdir)
    code, again, err = run(workdir)
    assert code == 0, err
    assert again == f"{sentences.RUN_FINISHED.format(workdir)}\n{out}"
    assert files(workdir) == before


@pytest.mark.parametrize("there", [True, False], ids=["with", "without the dataset"])
def test_what_was_removed_of_a_finished_run_is_written_anew(run, home, whole, tmp_path, there):
    """From the workdir alone."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    kept = {name: (workdir / name).read_bytes() for name in ("results.md", "ledger.jsonl", "pictures/matrix_aupro.png")}
    for name in ("results.md", "report.html", "pictures/matrix_aupro.png"):
        (workdir / name).unlink()
    for folder in () if there else ("candies", "prepared"):
        (home / folder).rename(home / f"{folder} elsewhere")
    code, out, err = run(workdir)
    for folder in () if there else ("candies", "prepared"):
        (home / f"{folder} elsewhere").rename(home / folder)
    assert code == 0, err
    assert sentences.RUN_FINISHED_SHORTLY not in out
    assert (sentences.DATASET_GONE_SHORTLY.format("candies") in err) != there
    assert {name: (workdir / name).read_bytes() for name in kept} == kept
    assert (workdir / "report.html").stat().st_size == pytest.approx((whole[0] / "report.html").stat().st_size, abs=50)


def test_another_config_in_the_same_workdir_is_refused(run, whole):
    workdir, _ = whole
    before = files(workdir)
    code, out, err = run(workdir, seed=1, **{"train.epochs": 7})
    assert (code, out) == (2, "")
    assert err.startswith(f"iumad_jax: {sentences.WORKDIR_OF_ANOTHER_CONFIG.format(workdir)}")
    assert sentences.KEY_DIFFERS.format(key="config.seed", there=0, now=1) in err
    assert sentences.KEY_DIFFERS.format(key="config.train.epochs", there=6, now=7) in err
    assert err.count("\n") == 1
    assert files(workdir) == before


def test_a_full_disk_stops_the_run(start, whole, tmp_path):
    """With room for the ledger but not for a snapshot."""
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
def test_other_modalities_and_methods(run, whole, tmp_path, modality, method):
    workdir = tmp_path / "run"
    changes = {"dataset.objects": "CandyCane", "train.epochs": 1, "modality": modality, "method": method}
    code, _, err = run(workdir, "1-0", **changes)
    assert code == 0, err
    results, trained = results_of(workdir), method == "ib_iumad"
    epochs = [set(event) for event in read(workdir / "ledger.jsonl") if event["event"] == "epoch"]
    terms = {"loss", "fusion", "kl", "ib_heads", "object_rgb", "object_depth", "compression"}
    terms |= {"gradient_norm", "update_norm"}
    assert epochs == ([{"event", "step", "epoch"} | terms] if trained else [])
    assert set(results["baselines"]) == {"feature_norm", "nearest_neighbours"} - {method}
    for metric in METRICS:
        ((value,),) = results["matrix"][metric]
        assert 0 <= value <= 1
        assert results["summary"][metric] == {
            "final": value, "acc": value, "fm": None, "fm_aggregate": None, "new": value
        }  # fmt: skip
    of_depth = (results["baselines"]["feature_norm"] if trained else results)["matrix"]["aupro"][0][0]
    assert of_depth != results_of(whole[0])["baselines"]["feature_norm"]["matrix"]["aupro"][0][0]


def test_joint_trains_on_all_objects_seen_so_far_and_says_that_it_is_not_incremental(run, home, tmp_path):
    workdir, changes = tmp_path / "run", {"method": "iuf", "model.class_grid": 8, "train.epochs": 1}
    code, out, err = run(workdir, **changes, **{"continual.strategy": "joint"})
    assert code == 0, err
    events = read(workdir / "ledger.jsonl")
    assert [event["images"] for event in events if event["event"] == "step"] == [5, 10]
    assert [event["learned"] for event in events if event["event"] == "step"] == [["CandyCane"], ["GummyBear"]]
    for text in (out, (workdir / "results.md").read_text()):
        assert sentences.STRATEGY_JOINT in text
    image = 64 * 64 * 3 * 4 + 4 * 4 * 192 * 4 + 4  # as prepared: pixels, features and the object's number
    assert 0 < results_of(workdir)["strategy_bytes"] <= 10 * image
    command = [sys.executable, "-m", "iumad_jax.evaluate", f"--workdir={workdir}"]  # tells the same of what was kept
    folder = workdir / "evaluations"
    for step in (0, 1):
        output = folder / str(step)
        subprocess.run([*command, f"--step={step}", f"--output={output}"], cwd=home, check=True)
    kept = [results_of(folder / str(step))["strategy_bytes"] for step in (0, 1)]
    assert kept == [results_of(workdir)["strategy_bytes"] // 2, results_of(workdir)["strategy_bytes"]]


def test_a_loss_that_is_not_finite_stops_the_run(run, whole, tmp_path):
    code, out, err = run(tmp_path / "run", **{"train.learning_rate": 1e30, "train.schedule": "step"})
    assert (code, out) == (2, "")
    *_, last = err.splitlines()
    what = sentences.UPDATE_NOT_FINITE.format(value="inf")
    told = sentences.IN_STEP.format(what=what, step=0, epoch=0, update=0, images="CandyCane/")
    assert last.startswith(f"iumad_jax: {told}")
    assert sentences.TRAINING_STOPPED in last
    assert [event["event"] for event in read(tmp_path / "run" / "ledger.jsonl")] == ["step"]
