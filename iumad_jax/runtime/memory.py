"""Memory of the process."""

import ctypes
from contextlib import suppress


def return_freed() -> None:
    """Return freed memory to the operating system.

    The allocator of glibc keeps it: after the compilation of a training update, 0.8 GB, which the next compilation
    cannot use in full. Other allocators do without.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
