"""SIGTERM and SIGINT end a command where nothing is lost, with an exit code that says: come again."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from iumad_jax.errors import INTERRUPTED, STOPPED_AT_ONCE

_PATIENCE = 8.0  # seconds until the process ends wherever it is

_requested = threading.Event()


class Interrupted(Exception):
    """The process was asked to end, and what it did is on disk."""


def requested() -> bool:
    """Whether the process was asked to end."""
    return _requested.is_set()


def wait() -> None:
    """Waits until the process is asked to end."""
    _requested.wait()


def check() -> None:
    """Raises Interrupted if the process was asked to end; called where all that was done is on disk."""
    if requested():
        raise Interrupted


@contextmanager
def handled() -> Iterator[None]:
    """Within, SIGTERM and the first SIGINT ask the process to end. Of the main thread alone.

    Who does not look whether it was asked, as in a long compilation, is ended after some seconds all the same: that is
    no worse than being killed, which a run survives at any moment.
    """
    _requested.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    before = signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)


def _watch(reader: int) -> None:
    """A thread of its own, since Python's handlers run in the main one, when that comes back from what it calls."""
    with open(reader, "rb", buffering=0) as signals:
        if not (number := signals.read(1)):
            return
        _requested.set()
        name = signal.Signals(number[0]).name
        told = f"stopping on {name}; the same command goes on from here (SIGINT, Ctrl-C, now ends it at once)."
        with suppress(OSError, ValueError):  # where nobody reads any more
            print("\n" * sys.stderr.isatty() + f"iumad_jax: {told}", file=sys.stderr, flush=True)
        end = time.monotonic() + _PATIENCE
        while select.select([signals], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (number := signals.read(1)):
                return
            if number[0] == signal.SIGINT:
                os._exit(STOPPED_AT_ONCE)
        os._exit(INTERRUPTED)
