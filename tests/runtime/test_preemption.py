"""SIGTERM and SIGINT, in this process where they ask and in another where nobody looks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from iumad_jax.runtime import preemption
from tests import sentences


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_handlers_are_there_only_within(number, capfd):
    before = signal.getsignal(number)
    for asked in (True, False):  # the second time anew
        with preemption.handled():
            preemption.check()
            if asked:
                os.kill(os.getpid(), number)
                while not preemption.requested():
                    time.sleep(0.001)
                with pytest.raises(preemption.Interrupted):
                    preemption.check()
        assert signal.getsignal(number) is before
        assert signal.set_wakeup_fd(-1) == -1
    told = capfd.readouterr().err
    assert told.startswith(f"iumad_jax: {sentences.STOPPING.format(signal.Signals(number).name)}")
    assert told.count("\n") == 1


NOBODY_LOOKS = """
import time
from iumad_jax.runtime import preemption

preemption._PATIENCE = 0.5
with preemption.handled():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGINT], 75),
        ([signal.SIGTERM, signal.SIGTERM], 75),
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGINT], 130),
    ],
)
def test_who_does_not_look_is_ended_all_the_same(signals, code):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NOBODY_LOOKS], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.wait() == code
        assert process.stderr.read().count("\n") == 1


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGTERM], 75), ([signal.SIGINT, signal.SIGINT], 130)])
def test_signals_work_when_nobody_reads_what_is_said(signals, code):
    """As behind `| tee`, which Ctrl-C ends first."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NOBODY_LOOKS], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        try:
            assert process.wait(timeout=10) == code
        finally:
            process.kill()
