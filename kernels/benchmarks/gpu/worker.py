"""The process of one part: goes through its cases and writes a row for each."""

import importlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kernels.benchmarks.gpu.results import Results, Row

NO_GPU = 3  # exit code
Cases = Iterator[tuple[str, Callable[[], Row]]]


class Options(NamedTuple):
    """What a part is told."""

    out: str  # the folder of all results
    scratch: str  # a folder that the parts share, and that is removed in the end
    data: str | None  # a dataset to train on
    rehearse: bool  # at tiny sizes on a CPU
    seconds: float  # until the process is killed


def work(module: str, name: str, options: Options) -> int:
    """Runs a part and returns the exit code of its process.

    A row may take half of the time that is left, the last one all of it; if it takes more, SIGALRM ends the process.

    Args:
        module: has cases(options) -> the rows' keys, and the functions that measure them.
        name: of the part.
        options: see there.
    """
    import jax  # loading takes a second, which the command itself need not

    from kernels.benchmarks import machine

    end = time.monotonic() + options.seconds
    if not options.rehearse and jax.default_backend() != "gpu":
        return NO_GPU
    if options.rehearse:
        _interpret_kernels()
    results = Results(Path(options.out) / f"{name}.json", options.rehearse)
    number = results.machine(machine.describe())
    cases: Cases = importlib.import_module(module).cases(options)
    due = sorted((case for case in cases if results.is_due(case[0])), key=lambda case: case[0] in results.failed)
    for key, measure in due:  # what failed before comes last
        results.begin(key)
        began = time.monotonic()
        if key != due[-1][0]:  # a kernel that hangs must not take the time of all others
            signal.alarm(max(1, int((end - began) / 2)))
        try:
            row = measure()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"}
        signal.alarm(0)
        row |= {"machine": number, "wall_seconds": time.monotonic() - began}
        results.put(key, row)
        print(f"{name}: {key}: {row.get('error', 'done')} ({row['wall_seconds']:.1f} s)", flush=True)
        if "error" in row:
            jax.block_until_ready(jax.numpy.zeros(1) + 1)  # fails where the GPU is lost to this process
    return 0


def _interpret_kernels() -> None:
    """Lets the Mosaic kernels run on a CPU, if this jax can."""
    from iumad_kernels.selective_scan import pallas_mosaic
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        pallas_mosaic.interpret = mosaic_gpu.InterpretGPUParams()


def main(arguments: list[str]) -> int:
    """MODULE NAME OPTIONS, the last in JSON."""
    module, name, options = arguments
    fields: dict[str, Any] = json.loads(options)
    return work(module, name, Options(**fields))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
