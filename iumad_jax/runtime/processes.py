"""Several processes run the same program on the same data (`joining`).

The first alone writes to the workdir, while the others wait for it.
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

_PATIENCE = 10**9  # milliseconds that a process waits for others that are alive: preparing a dataset can take days

_P = ParamSpec("_P")
_T = TypeVar("_T")
_barriers = itertools.count()


def is_process_zero() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def barrier(name: str = "", members: set[int] | None = None) -> None:
    """Waits for all other processes, or for the members of a meeting that has a name.

    Raises:
        JaxRuntimeError: one of them has ended.
    """
    wait = ocp.multihost.get_barrier_sync_fn(processes=members)
    wait(key=name or f"meeting {next(_barriers)}", timeout_ms=_PATIENCE)


def process_zero_only(function: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """The function, done by the first process while the others wait; for them it returns None."""

    @functools.wraps(function)
    def done(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        result = function(*args, **kwargs) if is_process_zero() else None
        barrier()
        return result

    return done


@contextmanager
def process_zero_first() -> Iterator[None]:
    """Within, the first process is alone, and then all others are."""
    if not is_process_zero():
        barrier()
    yield
    if is_process_zero():
        barrier()
    barrier()


def on_process_zero(make: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What the first process makes of the arguments; elsewhere something whose methods do nothing."""
    return make(*args, **kwargs) if is_process_zero() else _Noop()  # type: ignore[return-value]


class _Noop:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __len__(self) -> int:
        return 0


def all_processes(condition: bool) -> bool:
    """Whether a condition holds in every process, all of which ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


def check_same(own: Callable[[], dict[str, Any]]) -> None:
    """Compares the number of devices and what else every process has: by name, whatever JSON can hold.

    Raises:
        UserError: something differs; in all processes alike.
    """
    if jax.process_count() == 1:
        return
    digests = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()) for name, value in own().items()}
    barrier()  # others may need longer for their own than they wait for what follows
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        differing = ["number of devices"]
    else:
        given = multihost_utils.process_allgather(np.array([list(one.digest()) for one in digests.values()], np.uint8))
        differing = [name for place, name in enumerate(digests) if (given[:, place] != given[0, place]).any()]
    if differing:
        raise UserError(
            f"the processes differ in their {' and '.join(differing)}; give all of them the same command, and a workdir"
            " and a dataset that they share."
        )


def single_process() -> ocp.options.MultiprocessingOptions:
    """For Orbax: every process reads and writes for itself, without waiting for others."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
