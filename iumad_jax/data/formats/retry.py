"""Reading again after an error that is not the file's.

Python 3.11 may raise `SystemError` when several threads parse literals at a time (python/cpython#106905), as NumPy does
for the header of every `.npy` and `.npz` file. Reading again succeeds.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_ATTEMPTS = 5


def after_system_error(
    read: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """Call a function that reads a file, up to five times if it raises `SystemError`."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(SystemError):
            return read(*args, **kwargs)
    return read(*args, **kwargs)
