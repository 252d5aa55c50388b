"""Freed memory goes back to the operating system."""

import subprocess
import sys

import pytest

PROGRAM = """
import psutil
from iumad_jax.runtime import memory

rows = [bytearray(10_000) for _ in range(20_000)]
full = psutil.Process().memory_info().rss
kept = rows[::50]  # scattered over the heap, which therefore cannot shrink
del rows
before = psutil.Process().memory_info().rss
memory.return_freed()
print(full, before, psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is needed")
def test_freed_memory_is_returned():
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    full, before, after = map(int, output.split())
    assert full - before < 50e6  # the allocator keeps it
    assert full - after > 150e6
