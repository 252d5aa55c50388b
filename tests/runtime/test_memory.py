"""The allocator keeps large buffers, and returns freed memory on request."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")

RETURN = """
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


def test_freed_memory_is_returned():
    output = subprocess.run([sys.executable, "-c", RETURN], capture_output=True, text=True, check=True).stdout
    full, before, after = map(int, output.split())
    assert full - before < 50e6  # the allocator keeps it
    assert full - after > 150e6


KEEP = """
import resource
import sys
import threading
from iumad_jax.runtime import memory

if "jax" in sys.argv:
    import jax
if "keep" in sys.argv:
    memory.keep_buffers()


def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(200_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


threading.Thread(target=lambda: print(pages(), pages())).start()
"""


@pytest.mark.parametrize(("arguments", "kept"), [(["keep"], True), ([], False), (["jax", "keep"], False)])
def test_large_buffers_are_kept_in_all_threads_unless_jax_is_imported(arguments, kept):
    output = subprocess.run([sys.executable, "-c", KEEP, *arguments], capture_output=True, text=True, check=True).stdout
    first, second = map(int, output.split())
    assert second < first / 10 if kept else second > first / 2
