"""Measure the outcome, processor time and memory of reading one input."""

import time
import traceback
from pathlib import Path
from typing import NamedTuple

from iumad_jax.errors import UserError
from tests.fuzz.datasets import Target

SECONDS, MEGABYTES = 5.0, 512  # limits per input: processor time and additional memory
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Outcome(NamedTuple):
    """Outcome of reading an input."""

    kind: str  # "read", "refused" or "crash"
    seconds: float  # processor time
    megabytes: float  # peak of the additional resident memory
    message: str  # error message, empty for "read"


def watch(target: Target, name: str, content: bytes) -> Outcome:
    """Read an input. Anything but a result or a UserError of one sentence, within the limits, is a crash."""
    _RESET.write_text("5")  # resets the peak (VmHWM)
    memory, start = _memory("VmRSS"), time.process_time()
    kind, message = "read", ""
    try:
        target.read(name, content)
    except UserError as error:
        kind, message = "refused", str(error)
        if not (message.isprintable() and 10 < len(message) < 5000):
            kind, message = "crash", f"no sentence: {message!a:.300}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind, message = "crash", f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {str(error)[:200]!a}"
    seconds, megabytes = time.process_time() - start, _memory("VmHWM") - memory
    if seconds > SECONDS or megabytes > MEGABYTES:
        kind, message = "crash", f"too much: {seconds:.1f} s, {megabytes:.0f} MB"
    return Outcome(kind, seconds, megabytes, message)


def _memory(key: str) -> float:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
