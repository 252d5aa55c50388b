"""Scheduler that runs one part after another, each in a separate process with its share of the remaining time."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kernels.benchmarks.gpu.results import Results
from kernels.benchmarks.gpu.worker import NO_GPU, Options

DONE, OUT_OF_TIME = "done", "out of time"
_MIN_SECONDS = 1  # with less time left, no process is started


class Part(NamedTuple):
    """Module with a function cases(options), see `worker`, and its share of the time relative to other parts."""

    module: str
    share: float


class NoGPU(Exception):
    """JAX finds no GPU."""


def run(parts: dict[str, Part], options: Options) -> dict[str, str]:
    """Run the missing rows of all parts within options.seconds.

    Returns:
        A sentence for each part that is not done, by name.

    Raises:
        NoGPU: If this is no rehearsal and JAX finds no GPU.
        ValueError: If options.out contains other files under the names of results.
    """
    end, missing = time.monotonic() + options.seconds, {}
    names = list(parts)  # completed parts run too, in case they have new rows
    for name in names:
        _open(name, options)  # raises an error before any part runs
    for index, name in enumerate(names):
        start = time.monotonic()
        limit = (end - start) * parts[name].share / sum(parts[other].share for other in names[index:])
        print(f"{name}: at most {limit:.0f} s", flush=True)
        state = _run_part(name, parts[name].module, options._replace(seconds=limit))
        results = _open(name, options)
        results.content["state"] = state
        if results.path.exists():
            results.save()
        rows, failed = results.content["rows"], results.failed
        sentence = f"{name}: {state} after {time.monotonic() - start:.0f} s; rows done: {len(rows) - len(failed)}"
        if failed:
            key, row = next(iter(failed.items()))
            sentence += f", failed: {len(failed)}; first failure: {key}: {row['error'].rstrip('.')}"
        print(f"{sentence}.", flush=True)
        if state != DONE:
            missing[name] = f"{sentence}."
    return missing


def _open(name: str, options: Options) -> Results:
    return Results(Path(options.out) / f"{name}.json", options.rehearse)


def _run_part(name: str, module: str, options: Options) -> str:
    """Run a part and return its state. Restart failed processes as long as each tries a new row."""
    end, tried_rows = time.monotonic() + options.seconds, -1
    results = _open(name, options)
    results.content["tried"] = []
    if results.path.exists():
        results.save()
    while True:
        remaining = end - time.monotonic()
        if remaining < _MIN_SECONDS:
            return OUT_OF_TIME
        code = _run_process(name, module, options._replace(seconds=remaining))
        if code == NO_GPU:
            raise NoGPU
        if code is None:
            return OUT_OF_TIME
        results = _open(name, options)
        if code == 0:
            return "incomplete" if results.failed else DONE
        if len(results.content["tried"]) <= tried_rows or not results.content["tried"]:
            return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        tried_rows = len(results.content["tried"])


def _run_process(name: str, module: str, options: Options) -> int | None:
    """Run a process and return its exit code, or None if it ran out of time and was killed with its children."""
    command = [sys.executable, "-m", "kernels.benchmarks.gpu.worker", module, name, json.dumps(options._asdict())]
    compiled = f"{options.scratch}/compiled"  # shared by all parts
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled}
    # XLA tries several programs for each of an update's fusions, which takes longer than a part may.
    environment["XLA_FLAGS"] = f"--xla_gpu_experimental_enable_fusion_autotuner=false {os.environ.get('XLA_FLAGS', '')}"
    if options.rehearse:
        environment["JAX_PLATFORMS"] = "cpu"
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(options.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
