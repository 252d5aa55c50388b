"""Runs parts one after the other, each in a process of its own with its share of the time that is left."""

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
_LEAST = 1  # seconds, with less than which no part begins


class Part(NamedTuple):
    """A module with cases(options), see `worker`, and its share of the time, relative to those of other parts."""

    module: str
    share: float


class NoGPU(Exception):
    """There is none."""


def run(parts: dict[str, Part], options: Options) -> dict[str, str]:
    """Does what is missing of all parts within options.seconds.

    Returns:
        A sentence for each part that is not done.

    Raises:
        NoGPU: this is no rehearsal, and JAX finds none.
        ValueError: options.out holds something else.
    """
    end, missing = time.monotonic() + options.seconds, {}
    todo = list(parts)  # a part that is done ends at once, unless it has other rows now
    for name in todo:
        _open(name, options)  # raises
    for index, name in enumerate(todo):
        began = time.monotonic()
        limit = (end - began) * parts[name].share / sum(parts[other].share for other in todo[index:])
        print(f"{name}: at most {limit:.0f} s", flush=True)
        state = _run_part(name, parts[name].module, options._replace(seconds=limit))
        results = _open(name, options)
        results.content["state"] = state
        if results.path.exists():
            results.save()
        rows, failed = results.content["rows"], results.failed
        sentence = f"{name}: {state} after {time.monotonic() - began:.0f} s, {len(rows) - len(failed)} rows done"
        if failed:
            key, row = next(iter(failed.items()))
            sentence += f", {len(failed)} failed, the first of them {key}: {row['error'].rstrip('.')}"
        print(f"{sentence}.", flush=True)
        if state != DONE:
            missing[name] = f"{sentence}."
    return missing


def _open(name: str, options: Options) -> Results:
    return Results(Path(options.out) / f"{name}.json", options.rehearse)


def _run_part(name: str, module: str, options: Options) -> str:
    """The state that a part is in afterwards. One process follows another as long as each tries another row."""
    end, tried = time.monotonic() + options.seconds, -1
    results = _open(name, options)
    results.content["tried"] = []
    if results.path.exists():
        results.save()
    while True:
        left = end - time.monotonic()
        if left < _LEAST:
            return OUT_OF_TIME
        code = _run_process(name, module, options._replace(seconds=left))
        if code == NO_GPU:
            raise NoGPU
        if code is None:
            return OUT_OF_TIME
        results = _open(name, options)
        if code == 0:
            return "incomplete" if results.failed else DONE
        if len(results.content["tried"]) <= tried or not results.content["tried"]:
            return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        tried = len(results.content["tried"])


def _run_process(name: str, module: str, options: Options) -> int | None:
    """The exit code; None where it was killed, with all that it started, as its time was over."""
    command = [sys.executable, "-m", "kernels.benchmarks.gpu.worker", module, name, json.dumps(options._asdict())]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{options.scratch}/compiled"}  # parts share programs
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
