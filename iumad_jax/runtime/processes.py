"""Coordination of processes that run the same program on the same data (see `joining`).

Only process 0 writes to the workdir, while the others wait for it.
"""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from iumad_jax.errors import UserError

_TIMEOUT = 10**9  # milliseconds at a barrier; preparing a dataset can take days

_P = ParamSpec("_P")
_T = TypeVar("_T")
_barriers = itertools.count()


def is_process_zero() -> bool:
    """Return whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def barrier(name: str = "", members: set[int] | None = None) -> None:
    """Wait until all processes, or the given members, have reached the barrier.

    A barrier of members needs a unique name; others are numbered in the order of calls.

    Raises:
        JaxRuntimeError: If one of them has ended.
    """
    wait = ocp.multihost.get_barrier_sync_fn(processes=members)
    wait(key=name or f"barrier {next(_barriers)}", timeout_ms=_TIMEOUT)


def process_zero_only(function: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """Decorate a function to run in process 0 alone. The others wait, and their call returns None."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        result = function(*args, **kwargs) if is_process_zero() else None
        barrier()
        return result

    return wrapper


@contextmanager
def process_zero_first() -> Iterator[None]:
    """Run the body of the `with` statement in process 0 first, and then in all others."""
    if not is_process_zero():
        barrier()
    yield
    if is_process_zero():
        barrier()
    barrier()


def on_process_zero(create: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Create an object in process 0. The others get a substitute whose methods do nothing."""
    return create(*args, **kwargs) if is_process_zero() else _Noop()  # type: ignore[return-value]


class _Noop:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __len__(self) -> int:
        return 0


def all_processes(condition: bool) -> bool:
    """Return whether a condition holds in every process. Must be called by all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


def check_same(values: Callable[[], dict[str, Any]]) -> None:
    """Check that all processes have the same number of devices and the same values. Must be called by all processes.

    Args:
        values: Returns JSON values of this process by name. Called only if there are several processes.

    Raises:
        UserError: If something differs. All processes raise it.
    """
    if jax.process_count() == 1:
        return
    digests = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()) for name, value in values().items()}
    barrier()  # computing the values may take longer than the timeout of process_allgather
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        differing = ["number of devices"]
    else:
        local = np.array([list(digest.digest()) for digest in digests.values()], np.uint8)
        gathered = multihost_utils.process_allgather(local)
        differing = [name for i, name in enumerate(digests) if (gathered[:, i] != gathered[0, i]).any()]
    if differing:
        raise UserError(
            f"the processes differ in their {' and '.join(differing)}; start all of them with the same command, on a"
            " shared workdir and dataset."
        )


def single_process() -> ocp.options.MultiprocessingOptions:
    """Return Orbax options with which a process reads and writes by itself, without waiting for others."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
