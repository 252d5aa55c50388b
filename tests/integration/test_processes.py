"""The command as several processes that share its training: killed, started again, with more or fewer devices."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iumad_jax.data.candies import render
from iumad_jax.runtime.ledger import read
from tests import sentences
from tests.integration.conftest import SMALL, as_flags

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
KEYS = SMALL | {
    "dataset.name": "eyecandies",
    "dataset.root": "candies",
    "dataset.objects": "CandyCane,GummyBear",
    "dataset.prepared": "prepared",
    "method": "uniad",
    "baselines": "",
    "modality": "rgb",
    "model.dropout": 0.1,
    "train.epochs": 12,
    "train.batch_size": 3,  # over four devices
    "snapshots.every_minutes": 0.0,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command with so many devices, as one of several processes if told so by further flags."""
    home = tmp_path_factory.mktemp("home")
    render(home / "candies", train=7, val=1, test=4, size=64, objects=KEYS["dataset.objects"], progress=False)

    def start(workdir, devices, *flags, home=home):
        small = as_flags(KEYS)
        flags = [f"--config={QUICKSTART}:1-1", f"--workdir={workdir}", *small, *flags]
        return subprocess.Popen(
            [sys.executable, "-m", "iumad_jax.main", *flags],
            cwd=home,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def start_two(start):
    """Starts two processes with two devices each, which find each other; the second may have further flags."""

    def start_two(workdir, *of_both, of_second=(), devices=2, **place):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = [f"--coordinator={address}", "--processes=2", *of_both]
        second = start(workdir, devices, *flags, "--process=1", *of_second, **place)
        return start(workdir, 2, *flags, "--process=0"), second

    return start_two


def ends(process):
    """Exit code, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err


def assert_ends_since_another_did(process, limit):
    """It does so by itself before the time limit, says so, and does not pretend to be done."""
    try:
        _, err = process.communicate(timeout=max(limit - time.monotonic(), 1))
    finally:
        process.kill()
    assert process.returncode == 75
    *_, last = err.splitlines()
    assert last.startswith("iumad_jax: ")
    assert sentences.PROCESS_ENDED_SINCE_ANOTHER_DID in last
    assert last.endswith(sentences.PROCESSES_START_AGAIN)


def kill(process, ledger, place):
    """Kills a process when the ledger says so."""
    while not (ledger.exists() and place in ledger.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()


def assert_same(ledger, expected):
    """To rounding, since sums over images are taken in another order."""
    assert [event["event"] for event in ledger] == [event["event"] for event in expected]
    near = {"epoch": {"rel": 1e-4}, "evaluation": {"abs": 1e-3}}  # of whose pixels a few change places
    for event, other in zip(ledger, expected, strict=True):
        if tolerance := near.get(event["event"]):
            assert event == {k: pytest.approx(v, **tolerance) if isinstance(v, float) else v for k, v in other.items()}


def test_two_processes_train_as_one_does_whatever_happens_to_them(start, start_two, tmp_path):
    """With two devices each, a batch of three images, and processes that are killed; and so do four devices of one."""
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    first, second = start_two(two)
    kill(second, two / "ledger.jsonl", '"step": 0, "epoch": 3')
    killed = time.monotonic()
    assert ends(start(one, 1))[0] == 0
    expected = read(one / "ledger.jsonl")
    assert_ends_since_another_did(first, killed + 60)

    first, second = start_two(two)
    kill(first, two / "ledger.jsonl", '"step": 1, "epoch": 3')
    assert_ends_since_another_did(second, time.monotonic() + 60)

    shutil.copytree(two, four)
    code, _, err = ends(start(four, 4))
    assert code == 0, err
    assert_same(read(four / "ledger.jsonl"), expected)

    first, second = start_two(two)
    (code, out, err), (other_code, other_out, other_err) = ends(first), ends(second)
    assert (code, other_code) == (0, 0), (err, other_err)
    assert_same(read(two / "ledger.jsonl"), expected)
    assert sentences.PICTURES_ARE_IN.format(two) in out
    assert sentences.PROCESS_PRINTS_RESULTS.format(0) in other_out
    assert re.fullmatch(
        "iumad_jax: "
        + sentences.PROCESS_WAITS.format(process=1, processes=2, address=r"localhost:\d+", limit=300)
        + r"\n",
        other_err,
    )
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}  # and nothing else is written


@pytest.mark.parametrize(
    ("unlike", "told"),
    [
        ({"of_second": ["--config.seed=1"]}, "config"),
        ({"of_second": ["--workdir=elsewhere"]}, "workdir"),
        ({"of_second": ["--config.debug.nans=True"]}, "config"),
        ({"devices": 1}, sentences.NUMBER_OF_DEVICES),
    ],
    ids=["seed", "workdir", "debug", "devices"],
)
def test_processes_that_are_not_alike_do_not_train(start_two, tmp_path, unlike, told):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text("{}")
    for process in start_two(run, **unlike):
        code, _, err = ends(process)
        assert code == 2, err
        *_, last = err.splitlines()
        assert last.startswith(f"iumad_jax: {sentences.PROCESSES_DIFFER_IN_COMMAND.format(told)}")
    assert [path.name for path in run.iterdir()] == ["results.json"]


def test_processes_with_other_images_do_not_train(start_two, tmp_path):
    """Of the same names, as where each host has a disk of its own."""
    render(
        tmp_path / "candies", train=7, val=1, test=4, size=64, objects=KEYS["dataset.objects"], progress=False, seed=1
    )
    for process in start_two(tmp_path / "run", home=tmp_path):
        code, _, err = ends(process)
        assert code == 2, err
        assert f"iumad_jax: {sentences.PROCESSES_DIFFER.format(sentences.IMAGES_OF_PROCESSES)}" in err


def test_a_process_that_is_asked_to_end_has_the_first_one_save(start_two, tmp_path):
    run = tmp_path / "run"
    first, second = start_two(run, "--config.snapshots.every_minutes=60", "--config.train.epochs=400")
    while not ((run / "ledger.jsonl").exists() and '"epoch": 2' in (run / "ledger.jsonl").read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    asked = time.monotonic()
    second.send_signal(signal.SIGTERM)
    code, _, err = ends(first)
    assert time.monotonic() - asked < 10
    assert code == 75, err
    assert err.splitlines()[-1].startswith(f"iumad_jax: {sentences.STOPPING.format('SIGTERM')}")
    assert len(list((run / "snapshots_within_step").iterdir())) == 1
    code, _, err = ends(second)
    assert code == 75, err
    assert err.splitlines()[-1].startswith(f"iumad_jax: {sentences.STOPPING.format('SIGTERM')}")


def test_a_port_that_is_taken_is_told(start, tmp_path):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = ends(start(tmp_path, 1, f"--coordinator=localhost:{port}", "--processes=2", "--process=0"))
    assert code == 2
    *_, last = err.splitlines()
    told = sentences.COORDINATOR_PORT_TAKEN.format(address=f"localhost:{port}", reason="Address already in use")
    assert last.startswith(f"iumad_jax: {told}")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--coordinator=localhost", "--processes=2", "--process=0"], sentences.COORDINATOR_WRONG.format("localhost")),
        (
            ["--coordinator=localhost:x", "--processes=2", "--process=0"],
            sentences.COORDINATOR_WRONG.format("localhost:x"),
        ),
        (["--processes=2", "--process=0"], sentences.PROCESS_FLAGS_INCOMPLETE),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process=2"],
            sentences.PROCESS_OUT_OF_RANGE.format(process=2, most=1, processes=2),
        ),
    ],
)
def test_flags_that_do_not_name_a_process_are_refused(start, tmp_path, flags, sentence):
    code, out, err = ends(start(tmp_path / "run", 1, *flags))
    assert (code, out) == (2, "")
    assert err.startswith(f"iumad_jax: {sentence}")
    assert not (tmp_path / "run").exists()
