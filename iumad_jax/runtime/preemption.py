"""Graceful stop on SIGTERM or SIGINT: the command saves its work and exits with the code INTERRUPTED."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from iumad_jax.errors import INTERRUPTED, STOPPED_AT_ONCE

_GRACE_PERIOD = 8.0  # seconds from the first signal until the process is ended

_requested = threading.Event()


class Interrupted(Exception):
    """The process was asked to end, and its work is saved on disk."""


def requested() -> bool:
    """Return whether the process was asked to end."""
    return _requested.is_set()


def wait() -> None:
    """Wait until the process is asked to end."""
    _requested.wait()


def check() -> None:
    """Raise Interrupted if the process was asked to end. Call this only where all work is saved on disk."""
    if requested():
        raise Interrupted


@contextmanager
def handle_signals() -> Iterator[None]:
    """Make SIGTERM and the first SIGINT request the end of the process. Use this in the main thread only.

    If the code does not check for the request, as during a long compilation, the process is ended after a grace period.
    That is no worse than SIGKILL, which a run survives at any moment.
    """
    _requested.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    previous_writer = signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and the first SIGINT set. Use this in the main thread only."""
    stopped = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        stopped.set()
        restore()  # the next signal ends the process at once

    for number in previous:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()


def _watch(reader: int) -> None:
    """Handle the signals whose numbers arrive at the pipe, until it is closed.

    This runs in a thread because Python calls signal handlers in the main thread only after the running C call returns.
    """
    with open(reader, "rb", buffering=0) as signals:
        if not (received := signals.read(1)):
            return
        _requested.set()
        name = signal.Signals(received[0]).name
        message = f"stopping on {name}; run the same command again to continue (SIGINT or Ctrl-C now ends it at once)."
        with suppress(OSError, ValueError):  # standard error may be closed
            print("\n" * sys.stderr.isatty() + f"iumad_jax: {message}", file=sys.stderr, flush=True)
        end = time.monotonic() + _GRACE_PERIOD
        while select.select([signals], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (received := signals.read(1)):
                return
            if received[0] == signal.SIGINT:
                os._exit(STOPPED_AT_ONCE)
        os._exit(INTERRUPTED)
