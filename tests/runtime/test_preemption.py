"""SIGTERM and SIGINT, in this process and in one that never checks for requests."""

import os
import signal
import subprocess
import sys
import time

import pytest

from iumad_jax.runtime import preemption
from tests import sentences


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_the_end_and_handlers_are_restored(number, capfd):
    before = signal.getsignal(number)
    for send in (True, False):  # the second time, the request is cleared
        with preemption.handle_signals():
            preemption.check()
            if send:
                os.kill(os.getpid(), number)
                while not preemption.requested():
                    time.sleep(0.001)
                with pytest.raises(preemption.Interrupted):
                    preemption.check()
        assert signal.getsignal(number) is before
        assert signal.set_wakeup_fd(-1) == -1
    message = capfd.readouterr().err
    assert message.startswith(f"iumad_jax: {sentences.STOPPING.format(signal.Signals(number).name)}")
    assert message.count("\n") == 1


WITHOUT_CHECKS = """
import time
from iumad_jax.runtime import preemption

preemption._GRACE_PERIOD = 0.5
with preemption.handle_signals():
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
def test_a_process_that_does_not_check_is_ended(signals, code):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WITHOUT_CHECKS], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.wait() == code
        assert process.stderr.read().count("\n") == 1


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGTERM], 75), ([signal.SIGINT, signal.SIGINT], 130)])
def test_signals_work_with_a_closed_standard_error(signals, code):
    """This happens with `| tee`, which Ctrl-C ends first."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WITHOUT_CHECKS], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        try:
            assert process.wait(timeout=10) == code
        finally:
            process.kill()
