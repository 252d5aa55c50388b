"""Training by several processes: killed, resumed, and with more or fewer devices."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

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
    "train.epochs": 6,
    "train.batch_size": 3,  # fewer images than the four devices
    "snapshots.every_minutes": 0.0,
}


def arguments(workdir, *flags):
    return [f"--config={QUICKSTART}:1-1", f"--workdir={workdir}", *as_flags(KEYS), *flags]


@pytest.fixture(scope="module")
def home(tmp_path_factory, candies):
    """Create a folder with candies."""
    home = tmp_path_factory.mktemp("home")
    candies(home / "candies", KEYS["dataset.objects"], train=7, val=1, test=4)
    return home


@pytest.fixture(scope="module")
def start(home):
    """Return a function that starts the command with a number of devices, alone or as one of several processes."""

    def start(workdir, devices, *flags, home=home):
        return subprocess.Popen(
            [sys.executable, "-m", "iumad_jax.main", *arguments(workdir, *flags)],
            cwd=home,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def start_two(start):
    """Return a function that starts two connected processes with two devices each; the second can differ."""

    def start_two(workdir, *common_flags, second_flags=(), devices=2, **options):
        with socket.socket() as free_port:
            free_port.bind(("localhost", 0))
            address = f"localhost:{free_port.getsockname()[1]}"
        flags = [f"--coordinator={address}", "--processes=2", *common_flags]
        second = start(workdir, devices, *flags, "--process=1", *second_flags, **options)
        return start(workdir, 2, *flags, "--process=0"), second

    return start_two


def wait(process):
    """Return the exit code, standard output and standard error of a process."""
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err


def assert_ends_after_another_process(process, deadline):
    """Require that a process ends by itself before the deadline, reports why and asks to be restarted."""
    try:
        _, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
    finally:
        process.kill()
    assert process.returncode == 75
    *_, last = err.splitlines()
    assert last.startswith("iumad_jax: ")
    assert sentences.OTHER_PROCESS_ENDED in last
    assert last.endswith(sentences.PROCESSES_START_AGAIN)


def kill(process, ledger, text):
    """Kill a process when its ledger contains a text."""
    while not (ledger.exists() and text in ledger.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()


def assert_close(ledger, expected):
    """Compare ledgers up to rounding, because sums over images are computed in another order."""
    assert [event["event"] for event in ledger] == [event["event"] for event in expected]
    tolerances = {"epoch": {"rel": 1e-4}, "evaluation": {"abs": 1e-3}}  # a few pixels change ranks in evaluations
    for event, other in zip(ledger, expected, strict=True):
        if tolerance := tolerances.get(event["event"]):
            assert event == jax.tree.map(
                lambda v, tolerance=tolerance: pytest.approx(v, **tolerance) if isinstance(v, float) else v, other
            )


def test_killed_and_resumed_processes_train_like_a_single_one(start, start_two, tmp_path):
    """Two processes with two devices each, and one process with four devices, train on batches of three images."""
    single, two, four = (tmp_path / name for name in ("single", "two", "four"))
    first, second = start_two(two)
    kill(second, two / "ledger.jsonl", '"step": 0, "epoch": 3')
    killed_at = time.monotonic()
    assert wait(start(single, 1))[0] == 0
    expected = read(single / "ledger.jsonl")
    assert_ends_after_another_process(first, killed_at + 60)

    first, second = start_two(two)
    kill(first, two / "ledger.jsonl", '"step": 1, "epoch": 3')
    assert_ends_after_another_process(second, time.monotonic() + 60)

    shutil.copytree(two, four)
    code, _, err = wait(start(four, 4))
    assert code == 0, err
    assert_close(read(four / "ledger.jsonl"), expected)

    first, second = start_two(two)
    (code, out, err), (other_code, other_out, other_err) = wait(first), wait(second)
    assert (code, other_code) == (0, 0), (err, other_err)
    assert_close(read(two / "ledger.jsonl"), expected)
    assert sentences.PICTURES_ARE_IN.format(two) in out
    assert sentences.PROCESS_PRINTS_RESULTS.format(0) in other_out
    assert re.fullmatch(
        "iumad_jax: "
        + sentences.PROCESS_WAITS.format(process=1, processes=2, address=r"localhost:\d+", limit=300)
        + r"\n",
        other_err,
    )
    assert {path.name for path in two.iterdir()} == {
        path.name for path in single.iterdir()
    }  # no other files are written


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({"second_flags": ["--config.seed=1"]}, "config"),
        ({"second_flags": ["--workdir=elsewhere"]}, "workdir"),
        ({"second_flags": ["--config.debug.nans=True"]}, "config"),
        ({"devices": 1}, sentences.NUMBER_OF_DEVICES),
    ],
    ids=["seed", "workdir", "debug", "devices"],
)
def test_processes_with_different_settings_are_refused(start_two, tmp_path, differences, message):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text("{}")
    for process in start_two(run, **differences):
        code, _, err = wait(process)
        assert code == 2, err
        *_, last = err.splitlines()
        assert last.startswith(f"iumad_jax: {sentences.PROCESSES_DIFFER_IN_COMMAND.format(message)}")
    assert [path.name for path in run.iterdir()] == ["results.json"]


def test_processes_with_different_images_are_refused(start_two, tmp_path, candies):
    """The images have the same names, as they may on hosts with separate disks."""
    candies(tmp_path / "candies", KEYS["dataset.objects"], train=7, val=1, test=4)
    data = tmp_path / "candies/CandyCane/train/data"
    shutil.copy(data / "000_image_4.png", data / "001_image_4.png")
    for process in start_two(tmp_path / "run", home=tmp_path):
        code, _, err = wait(process)
        assert code == 2, err
        assert f"iumad_jax: {sentences.PROCESSES_DIFFER.format(sentences.IMAGES_OF_PROCESSES)}" in err


def test_a_signal_to_any_process_lets_process_0_save(start_two, tmp_path):
    run = tmp_path / "run"
    first, second = start_two(run, "--config.snapshots.every_minutes=60", "--config.train.epochs=400")
    while not ((run / "ledger.jsonl").exists() and '"epoch": 2' in (run / "ledger.jsonl").read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    signalled_at = time.monotonic()
    second.send_signal(signal.SIGTERM)
    code, _, err = wait(first)
    assert time.monotonic() - signalled_at < 10
    assert code == 75, err
    assert err.splitlines()[-1].startswith(f"iumad_jax: {sentences.STOPPING.format('SIGTERM')}")
    assert len(list((run / "snapshots_within_step").iterdir())) == 1
    code, _, err = wait(second)
    assert code == 75, err
    assert err.splitlines()[-1].startswith(f"iumad_jax: {sentences.STOPPING.format('SIGTERM')}")


def test_a_port_in_use_is_reported(start, tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, _, err = wait(start(tmp_path, 1, f"--coordinator=localhost:{port}", "--processes=2", "--process=0"))
    assert code == 2
    *_, last = err.splitlines()
    message = sentences.COORDINATOR_PORT_TAKEN.format(address=f"localhost:{port}", reason="Address already in use")
    assert last.startswith(f"iumad_jax: {message}")


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
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_flags_that_do_not_identify_a_process_are_refused(command, tmp_path, flags, sentence):
    code, out, err = command("main", *arguments(tmp_path / "run", *flags))
    assert (code, out) == (2, "")
    assert err.startswith(f"iumad_jax: {sentence}")
    assert not (tmp_path / "run").exists()
