"""Several processes run the same program on the same data.

The first alone writes to the workdir, while the others wait for it.
"""

import atexit
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src import distributed  # as Orbax does: only here is the store that all processes share
from jax.experimental import multihost_utils

from iumad_jax.errors import UserError
from iumad_jax.runtime import preemption
from iumad_jax.runtime.devices import AXIS, mean_over_devices

_PATIENCE_TO_FIND = 300  # seconds in which all processes must have started
_ASKED = "asked to end"  # a key in the store that all processes share
_SILENCE = 30  # seconds without a sign of life after which a process counts as dead
_PATIENCE = 10**9  # milliseconds that a process waits for others that are alive: preparing a dataset can take days

_P = ParamSpec("_P")
_T = TypeVar("_T")
_meetings = itertools.count()


@contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None, cluster: bool) -> Iterator[None]:
    """Makes this process one of several within, if any argument is given; before JAX is used.

    Args:
        coordinator: host and port at which the first process is found.
        processes: how many there are.
        process: which this is, from 0.
        cluster: whether JAX finds out all three, as it does under SLURM and Open MPI.

    Raises:
        UserError: arguments are missing, or nobody is at the coordinator.
        Interrupted: another process has ended, or this one was asked to; it is told.
    """
    given = (coordinator, processes, process)
    if not cluster and given == (None, None, None):
        yield
        return
    if cluster != (given == (None, None, None)) or (not cluster and None in given):
        raise UserError("--coordinator, --processes and --process belong together; or let --cluster find all three.")
    if process is not None and processes is not None and process >= processes:
        raise UserError(f"--process is {process}; use 0 to {processes - 1}, as --processes is {processes}.")
    if coordinator is not None:
        _check_address(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    lost = "start all of them again to go on from the last snapshot"
    with _last_words(f"iumad_jax: not all processes came within {_PATIENCE_TO_FIND} s; start all of them again."):
        _find(coordinator, processes, process)
    with _last_words(f"iumad_jax: a process has ended, by itself or since another one had; {lost}."):
        try:
            _find_devices()
            with _end_together():
                yield
            jax.distributed.shutdown()
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                if not preemption.requested():
                    told = (
                        f"this process cannot go on, perhaps since another one has ended ({str(error).splitlines()[0]})"
                    )
                    print(f"iumad_jax: {told}; {lost}.", file=sys.stderr, flush=True)
                error = preemption.Interrupted()
            codes = {UserError: 2, preemption.Interrupted: preemption.EXIT_CODE}
            atexit.register(_leave, next((code for kind, code in codes.items() if isinstance(error, kind)), 1))
            raise error


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    try:
        valid = host.encode("idna") and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
    except UnicodeError:
        valid = False
    if not valid:
        raise UserError(f'--coordinator is "{coordinator}"; give the host of process 0 and a free port, HOST:PORT.')


def _find(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Waits until all processes have found each other.

    JAX aborts a process that does not find the coordinator, or whose port for it is taken: both are tried first.
    """
    if coordinator is not None:
        told = f"process {process} of {processes} waits for the others at {coordinator}, up to {_PATIENCE_TO_FIND} s"
        print(f"iumad_jax: {told}", file=sys.stderr, flush=True)
        (_check_free if process == 0 else _wait_for)(coordinator)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate" if coordinator else None,  # else SLURM's would give it one GPU
            initialization_timeout=_PATIENCE_TO_FIND,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_SILENCE,
        )
    except ValueError as error:
        raise UserError("--cluster finds no job of SLURM, Open MPI or the like; use --coordinator.") from error


def _check_free(coordinator: str) -> None:
    """Raises UserError if this process cannot listen at the coordinator's port."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        reason = os.strerror(error.errno or errno.EADDRINUSE)
        raise UserError(f"--coordinator={coordinator}: {reason}; give all processes another port.") from error


def _wait_for(coordinator: str) -> None:
    """Waits until something listens at the coordinator's address."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + _PATIENCE_TO_FIND
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            preemption.check()
            if time.monotonic() > end:
                reason = error.strerror or "no answer"
                raise UserError(
                    f"--coordinator={coordinator}: {reason} for {_PATIENCE_TO_FIND} s; start process 0 there."
                ) from error
            time.sleep(1)
        else:
            return


def _find_devices() -> None:
    """Waits until the processes have found each other's devices, too.

    They wait for half a minute when they first exchange anything, and later as long as another process compiles.
    """
    _meet()
    check_same(lambda: {"version of JAX": jax.__version__, "number of devices": jax.local_device_count()})
    everywhere(True)
    jax.block_until_ready(jax.pmap(mean_over_devices, axis_name=AXIS)(np.zeros(jax.local_device_count())))


@contextmanager
def _end_together() -> Iterator[None]:
    """Within, a process that is asked to end asks the first one, which saves and ends; then all others end, too."""
    store, done = _store(), threading.Event()

    def ask() -> None:
        preemption.wait()
        with suppress(jax.errors.JaxRuntimeError):  # the first one is gone
            store.key_value_set(_ASKED, "", allow_overwrite=True)

    def listen() -> None:
        while not done.wait(1):
            with suppress(jax.errors.JaxRuntimeError):  # nobody asked
                store.key_value_try_get(_ASKED)
                signal.raise_signal(signal.SIGTERM)
                return

    threading.Thread(target=listen if is_first() else ask, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def _last_words(words: str) -> Iterator[None]:
    """Has the words said if this process ends within, as when it is killed: JAX aborts it when another one dies."""
    speaker = subprocess.Popen(
        ["sh", "-c", 'trap "" INT TERM; read -r _ || echo "$0" >&2', words], stdin=subprocess.PIPE
    )
    silence = functools.partial(speaker.communicate, b"\n")
    with preemption.before_cut_off(silence):
        try:
            yield
        finally:
            silence()


def _leave(code: int) -> None:
    """Ends the process without waiting for the others, which wait for this one and then end, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def by_first(function: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """The function, done by the first process while the others wait; for them it returns None."""

    @functools.wraps(function)
    def done(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        result = function(*args, **kwargs) if is_first() else None
        _meet()
        return result

    return done


@contextmanager
def first_before_others() -> Iterator[None]:
    """Within, the first process is alone, and then all others are."""
    if not is_first():
        _meet()
    yield
    if is_first():
        _meet()
    _meet()


def in_first(make: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What the first process makes of the arguments; elsewhere something whose methods do nothing."""
    return make(*args, **kwargs) if is_first() else _Mute()  # type: ignore[return-value]


class _Mute:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __len__(self) -> int:
        return 0


def everywhere(condition: bool) -> bool:
    """Whether a condition holds in every process, all of which ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


def check_same(own: Callable[[], dict[str, Any]]) -> None:
    """Compares what every process has: by name, whatever JSON can hold.

    Raises:
        UserError: something differs; in all processes alike.
    """
    if jax.process_count() == 1:
        return
    store, meeting = _store(), f"comparison {next(_meetings)}"
    store.key_value_set(f"{meeting} {jax.process_index()}", json.dumps({k: _digest(v) for k, v in own().items()}))
    others = [f"{meeting} {process}" for process in range(jax.process_count())]
    given = [json.loads(store.blocking_key_value_get(other, _PATIENCE)) for other in others]
    if differing := [name for name in given[0] if any(one[name] != given[0][name] for one in given)]:
        if is_first():
            time.sleep(2)  # the others, which JAX aborts when this one ends, are to tell it as well
        raise UserError(
            f"the processes differ in their {' and '.join(differing)}; give all of them the same command, and a workdir"
            " and a dataset that they share."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _store() -> Any:
    """Where processes find what others have put under a name, text by text."""
    return distributed.global_state.client


def alone() -> ocp.options.MultiprocessingOptions:
    """For Orbax: every process reads and writes for itself, without waiting for others."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def _meet() -> None:
    """Waits for all other processes."""
    ocp.multihost.get_barrier_sync_fn()(key=f"meeting {next(_meetings)}", timeout_ms=_PATIENCE)
