"""Process of one part, which measures its cases and writes one row for each."""

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
    """Options of a part."""

    out: str  # folder of all results
    scratch: str  # temporary folder that the parts share
    data: str | None  # folder of the dataset to train on; None for rendered candies
    rehearse: bool  # whether to run at tiny sizes on a CPU
    seconds: float  # time until the process is killed


def work(module: str, name: str, options: Options) -> int:
    """Run a part and return the exit code of its process.

    A row may take half of the remaining time, the last row all of it. If it takes longer, SIGALRM ends the process.

    Args:
        module: Module whose function cases(options) yields the keys of the rows and the functions that measure them.
        name: Name of the part.
        options: Options of the part.
    """
    import jax  # here, so that the command itself does not spend a second on loading it

    from kernels.benchmarks import machine

    end = time.monotonic() + options.seconds
    if not options.rehearse and jax.default_backend() != "gpu":
        return NO_GPU
    if options.rehearse:
        _interpret_kernels()
    results = Results(Path(options.out) / f"{name}.json", options.rehearse)
    machine_index = results.machine(machine.describe())
    cases: Cases = importlib.import_module(module).cases(options)
    due_cases = sorted((case for case in cases if results.is_due(case[0])), key=lambda case: case[0] in results.failed)
    for key, measure in due_cases:  # rows that failed before come last
        results.begin(key)
        start = time.monotonic()
        if key != due_cases[-1][0]:  # a kernel that hangs must leave time for the other rows
            signal.alarm(max(1, int((end - start) / 2)))
        try:
            row = measure()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"}
        signal.alarm(0)
        row |= {"machine": machine_index, "wall_seconds": time.monotonic() - start}
        results.put(key, row)
        print(f"{name}: {key}: {row.get('error', 'done')} ({row['wall_seconds']:.1f} s)", flush=True)
        if "error" in row:
            jax.block_until_ready(jax.numpy.zeros(1) + 1)  # fails if this process has lost the GPU
    return 0


def _interpret_kernels() -> None:
    """Run the Mosaic kernels in the interpreter on a CPU, if this version of jax has it."""
    from iumad_kernels.selective_scan import pallas_mosaic
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        pallas_mosaic.interpret = mosaic_gpu.InterpretGPUParams()


def main(arguments: list[str]) -> int:
    """Run the part of the arguments MODULE NAME OPTIONS, where OPTIONS is JSON."""
    module, name, options = arguments
    fields: dict[str, Any] = json.loads(options)
    return work(module, name, Options(**fields))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
