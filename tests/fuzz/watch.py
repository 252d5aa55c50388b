"""One input at a time, watched: what came of it, how long a processor took and how much memory."""

import time
import traceback
from pathlib import Path
from typing import NamedTuple

from iumad_jax.errors import UserError
from tests.fuzz.datasets import Target

SECONDS, MEGABYTES = 5.0, 512  # what an input may take: of a processor's time; of memory beyond what the process had
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Outcome(NamedTuple):
    """What came of an input."""

    kind: str  # "read", "refused" or "crash"
    seconds: float  # of a processor
    megabytes: float  # the most that the process had in memory meanwhile, less what it had before
    told: str


def watch(target: Target, name: str, content: bytes) -> Outcome:
    """Has a target read an input. Everything but a result or one sentence, in time and in bounds, is a crash."""
    _RESET.write_text("5")  # from here on the peak is counted anew
    before, began = _memory("VmRSS"), time.process_time()
    kind, told = "read", ""
    try:
        target.read(name, content)
    except UserError as error:
        kind, told = "refused", str(error)
        if not (told.isprintable() and 10 < len(told) < 5000):
            kind, told = "crash", f"no sentence: {told!a:.300}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind, told = "crash", f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {str(error)[:200]!a}"
    seconds, megabytes = time.process_time() - began, _memory("VmHWM") - before
    if seconds > SECONDS or megabytes > MEGABYTES:
        kind, told = "crash", f"too much: {seconds:.1f} s, {megabytes:.0f} MB"
    return Outcome(kind, seconds, megabytes, told)


def _memory(key: str) -> float:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
