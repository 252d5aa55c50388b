"""Memory of the process."""

import ctypes
from contextlib import suppress


def return_freed() -> None:
    """Return freed memory to the operating system.

    glibc keeps it: 0.8 GB after the compilation of a training update, in pieces that later compilations reuse only in
    part. Where there is no `malloc_trim`, nothing happens.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
