"""Makes this process one of several, with JAX's distributed runtime, and ends it when another one ends."""

import atexit
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import jax
import numpy as np

from iumad_jax.errors import INTERRUPTED, USER_ERROR, UserError
from iumad_jax.runtime import preemption, processes
from iumad_jax.runtime.devices import AXIS, mean_over_devices

_PATIENCE = 300  # seconds in which all processes must have started
_SILENCE = 30  # seconds without a sign of life after which a process counts as dead
_FIRST_ENDS = "the first process ends"  # a meeting at which all others wait for it

_ending = threading.Lock()  # who has it ends this process


@contextmanager
def joined(coordinator: str | None, number: int | None, process: int | None, cluster: bool) -> Iterator[None]:
    """Makes this process one of several within, if any argument is given; before JAX is used.

    When another one ends, this one says so and ends, with the exit code INTERRUPTED.

    Args:
        coordinator: host and port at which the first process is found.
        number: how many there are.
        process: which this is, from 0.
        cluster: whether JAX finds out all three, as it does under SLURM and Open MPI.

    Raises:
        UserError: arguments are missing, nobody is at the coordinator, or the processes differ.
    """
    given = [one is not None for one in (coordinator, number, process)]
    if not cluster and not any(given):
        yield
        return
    if any(given) if cluster else not all(given):
        raise UserError("--coordinator, --processes and --process belong together; or let --cluster find all three.")
    if process is not None and number is not None and process >= number:
        raise UserError(f"--process is {process}; use 0 to {number - 1}, as --processes is {number}.")
    if coordinator is not None:
        _find(coordinator, number, process)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        jax.distributed.initialize(
            coordinator,
            number,
            process,
            cluster_detection_method="deactivate" if coordinator else None,  # else SLURM's would give it one GPU
            initialization_timeout=_PATIENCE,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_SILENCE,
        )
    except ValueError as error:
        raise UserError("--cluster finds no job of SLURM, Open MPI or the like; use --coordinator.") from error
    try:
        _watch_others()
        processes.check_same(lambda: {"version of JAX": jax.__version__})
        # devices wait for half a minute when they first exchange anything, later as long as another process compiles
        jax.block_until_ready(jax.pmap(mean_over_devices, axis_name=AXIS)(np.zeros(jax.local_device_count())))
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            _end(f" ({str(error).splitlines()[0]})")
        _ending.acquire()
        if processes.is_process_zero():
            time.sleep(1)  # others may be about to end for the same reason, and say it
            with suppress(jax.errors.JaxRuntimeError):
                processes.barrier(_FIRST_ENDS)
        codes = {UserError: USER_ERROR, preemption.Interrupted: INTERRUPTED}
        atexit.register(_leave, next((code for kind, code in codes.items() if isinstance(error, kind)), 1))
        raise
    _ending.acquire()
    jax.distributed.shutdown()


def _find(coordinator: str, number: int | None, process: int | None) -> None:
    """Waits for the coordinator, which process 0 will be: JAX aborts if it is not there, or if its port is taken."""
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) >= 2**16:
        raise UserError(f'--coordinator is "{coordinator}"; give the host of process 0 and a free port, HOST:PORT.')
    told = f"process {process} of {number} waits for the others at {coordinator}, up to {_PATIENCE} s"
    print(f"iumad_jax: {told}", file=sys.stderr, flush=True)
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            if process == 0:
                return socket.create_server(("", int(port))).close()
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, UnicodeError) as error:
            reason, *_ = str(getattr(error, "strerror", None) or error).split(" (")
            told = f"--coordinator={coordinator}: {reason}"
            if process == 0:
                raise UserError(f"{told}; give all processes another port.") from error
            if time.monotonic() > end:
                raise UserError(f"{told} for {_PATIENCE} s; start process 0 there.") from error
        preemption.check()
        time.sleep(1)


def _watch_others() -> None:
    """Has the first process save and end when another is asked to end, and the others end when it does."""
    own = jax.process_index()
    asked = [(f"process {one} is asked to end", {0, one}) for one in range(jax.process_count())]
    if processes.is_process_zero():
        for meeting, members in asked[1:]:
            _meet_later(meeting, members, then=lambda: signal.raise_signal(signal.SIGTERM))
    else:
        _meet_later(*asked[own], first=preemption.wait)
        _meet_later(_FIRST_ENDS, None, then=_end)


def _meet_later(
    meeting: str, members: set[int] | None, first: Callable = lambda: None, then: Callable = lambda: None
) -> None:
    """Meets others in the background; if one that should come ends instead, this process ends, too."""

    def meet() -> None:
        first()
        try:
            processes.barrier(meeting, members)
        except jax.errors.JaxRuntimeError:
            _end()
        else:
            then()

    threading.Thread(target=meet, daemon=True).start()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Ends this process where JAX aborts it, as it does when another one has ended; no public option prevents it."""
    _end()
    time.sleep(_SILENCE)  # in which this process ends as it was about to


def _end(reason: str = "") -> None:
    """Ends this process since another one has ended, unless it ends already."""
    if not _ending.acquire(blocking=False):
        return
    if not preemption.requested():
        told = f"this process ends, as another one has ended or did not come within {_PATIENCE} s{reason}"
        with suppress(OSError):
            print(f"iumad_jax: {told}; start all of them again to go on from the last snapshot.", file=sys.stderr)
    _leave(INTERRUPTED)


def _leave(code: int) -> None:
    """Ends this process without waiting for the others."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
