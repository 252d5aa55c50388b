"""The command as several processes that share its training: killed, started again, with more or fewer devices."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from iumad_jax.data.candies import render
from iumad_jax.report.ledger import read

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
SMALL = {
    "dataset.name": "eyecandies",
    "dataset.root": "candies",
    "dataset.objects": "CandyCane,GummyBear",
    "dataset.prepared": "prepared",
    "method": "uniad",
    "floors": "",
    "modality": "rgb",
    "input.size": 64,
    "backbone.grid": 8,
    "model.width": 8,
    "model.hidden": 8,
    "model.heads": 2,
    "model.dropout": 0.1,
    "train.epochs": 12,
    "train.batch_size": 3,  # over four devices
    "report.pictures_per_object": 1,
    "snapshots.every_minutes": 0.0,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command with so many devices, as one of several processes if told so by further flags."""
    home = tmp_path_factory.mktemp("home")
    render(home / "candies", train=7, val=1, test=4, size=64, objects=SMALL["dataset.objects"], progress=False)
    quick = {  # compiled without optimisation, and once for all processes
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }

    def start(workdir, devices, *flags):
        flags = [f"--config={QUICKSTART}:1-1", f"--workdir={workdir}", *flags]
        return subprocess.Popen(
            [sys.executable, "-m", "iumad_jax.main", *flags, *(f"--config.{key}={SMALL[key]}" for key in SMALL)],
            cwd=home,
            env=os.environ | quick | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def start_two(start):
    """Starts two processes with two devices each, which find each other."""

    def start_two(workdir):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = [f"--coordinator={address}", "--processes=2"]
        return [start(workdir, 2, *flags, f"--process={process}") for process in (0, 1)]

    return start_two


def ends(process):
    """Exit code, standard output, standard error, seconds that it still took."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err, time.monotonic() - began


def kill(process, ledger, place):
    """Kills a process when the ledger says so."""
    while not (ledger.exists() and place in ledger.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """The ledger of one process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    code, _, err, _ = ends(start(workdir, 1))
    assert code == 0, err
    return read(workdir / "ledger.jsonl")


def assert_same(ledger, expected):
    """To rounding, since sums over images are taken in another order."""
    for event, other in zip(ledger, expected, strict=True):
        assert event.keys() == other.keys()
        for name, value in other.items():
            if event["event"] == "epoch" or not isinstance(value, float):
                assert event[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_two_processes_train_as_one_does_whatever_happens_to_them(start, start_two, one, tmp_path):
    workdir = tmp_path / "run"
    first, second = start_two(workdir)
    kill(second, workdir / "ledger.jsonl", '"step": 0, "epoch": 3')
    code, out, err, seconds = ends(first)
    print(code, out, err, seconds)

    first, second = start_two(workdir)
    kill(first, workdir / "ledger.jsonl", '"step": 1, "epoch": 3')
    code, out, err, seconds = ends(second)
    print(code, out, err, seconds)

    shutil.copytree(workdir, tmp_path / "copy")
    for process in start_two(workdir):
        print(ends(process))
    assert_same(read(workdir / "ledger.jsonl"), one)
    print(ends(start(tmp_path / "copy", 4)))
    assert_same(read(tmp_path / "copy" / "ledger.jsonl"), one)
    assert 0
