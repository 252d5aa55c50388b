"""Joins this process with others in JAX's distributed runtime, and ends it when another one ends."""

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

_START_TIMEOUT = 300  # seconds within which all processes must start
_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as dead
_PROCESS_ZERO_ENDS = "process 0 ends"  # barrier at which all others wait for process 0

_ending = threading.Lock()  # held by the thread that ends this process


@contextmanager
def joined(coordinator: str | None, number: int | None, process: int | None, cluster: bool) -> Iterator[None]:
    """Join this process with others for the body of the `with` statement, if any argument is given.

    Must be entered before JAX is used. If another process ends, this one reports it and ends with exit code
    INTERRUPTED.

    Args:
        coordinator: HOST:PORT of process 0.
        number: Number of processes.
        process: Rank of this process, from 0.
        cluster: Whether JAX detects these three, as it can under SLURM and Open MPI.

    Raises:
        UserError: If arguments are missing, the coordinator does not answer, or the processes differ.
    """
    present = [argument is not None for argument in (coordinator, number, process)]
    if not cluster and not any(present):
        yield
        return
    if any(present) if cluster else not all(present):
        raise UserError("--coordinator, --processes and --process must be given together, or --cluster without them.")
    if process is not None and number is not None and process >= number:
        raise UserError(f"--process is {process}; choose 0 to {number - 1}, since --processes is {number}.")
    if coordinator is not None:
        _await_coordinator(coordinator, number, process)
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        jax.distributed.initialize(
            coordinator,
            number,
            process,
            # SLURM's detection would assign a single GPU
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=_START_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise UserError("--cluster finds no job of SLURM, Open MPI or similar; use --coordinator instead.") from error
    try:
        _watch_others()
        processes.check_same(lambda: {"version of JAX": jax.__version__})
        # The first exchange between devices times out after 30 s; later ones wait while another process compiles.
        jax.block_until_ready(jax.pmap(mean_over_devices, axis_name=AXIS)(np.zeros(jax.local_device_count())))
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            _end(f" ({str(error).splitlines()[0]})")
        _ending.acquire()
        if processes.is_process_zero():
            time.sleep(1)  # lets others report the same error before they end
            with suppress(jax.errors.JaxRuntimeError):
                processes.barrier(_PROCESS_ZERO_ENDS)
        codes = {UserError: USER_ERROR, preemption.Interrupted: INTERRUPTED}
        atexit.register(_leave, next((code for kind, code in codes.items() if isinstance(error, kind)), 1))
        raise
    _ending.acquire()
    jax.distributed.shutdown()


def _await_coordinator(coordinator: str, number: int | None, process: int | None) -> None:
    """Wait for the coordinator, or in process 0 check its port. JAX would abort on a failure.

    Raises:
        UserError: If the address is invalid, its port is taken, or process 0 does not start in time.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) >= 2**16:
        raise UserError(f'--coordinator is "{coordinator}"; use HOST:PORT with the host of process 0 and a free port.')
    message = f"process {process} of {number} waits for the others at {coordinator}, up to {_START_TIMEOUT} s"
    print(f"iumad_jax: {message}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        try:
            if process == 0:
                return socket.create_server(("", int(port))).close()
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, UnicodeError) as error:
            reason, *_ = str(getattr(error, "strerror", None) or error).split(" (")
            problem = f"--coordinator={coordinator}: {reason}"
            if process == 0:
                raise UserError(f"{problem}; choose another port for all processes.") from error
            if time.monotonic() > deadline:
                raise UserError(f"{problem} for {_START_TIMEOUT} s; start process 0 on this host.") from error
        preemption.check()
        time.sleep(1)


def _watch_others() -> None:
    """Let process 0 save and end when another process is asked to end, and let the others end with process 0."""
    barriers = [(f"process {index} is asked to end", {0, index}) for index in range(jax.process_count())]
    if processes.is_process_zero():
        for barrier, members in barriers[1:]:
            _wait_in_background(barrier, members, after=lambda: signal.raise_signal(signal.SIGTERM))
    else:
        _wait_in_background(*barriers[jax.process_index()], before=preemption.wait)
        _wait_in_background(_PROCESS_ZERO_ENDS, None, after=_end)


def _wait_in_background(
    barrier: str, members: set[int] | None, before: Callable = lambda: None, after: Callable = lambda: None
) -> None:
    """Call `before`, wait at a barrier, and call `after`, all in a thread.

    If another member ends instead of arriving, this process ends, too.
    """

    def wait() -> None:
        before()
        try:
            processes.barrier(barrier, members)
        except jax.errors.JaxRuntimeError:
            _end()
        else:
            after()

    threading.Thread(target=wait, daemon=True).start()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Handle JAX's abort of this process after another one has ended, which no public option prevents."""
    _end()
    time.sleep(_HEARTBEAT_TIMEOUT)  # in which another thread may already be ending this process


def _end(reason: str = "") -> None:
    """End this process because another one has ended, unless it is ending already."""
    if not _ending.acquire(blocking=False):
        return
    if not preemption.requested():
        cause = f"another one has ended or did not start within {_START_TIMEOUT} s{reason}"
        message = f"this process ends, since {cause}; restart all processes to continue from the last snapshot."
        with suppress(OSError):
            print(f"iumad_jax: {message}", file=sys.stderr)
    _leave(INTERRUPTED)


def _leave(code: int) -> None:
    """End this process without waiting for the others."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
