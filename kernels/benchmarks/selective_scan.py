"""Measure the time of the selective scan, forward and forward + backward, and of JAX's own scans, in turns.

    python -m kernels.benchmarks.selective_scan --shapes=target,long --json=out.json --picture=out.png

Shapes are batch x length x channels x states x groups, or names of lists: `target`, `es2d` (the Mamba decoder's shapes
at patch sizes 4, 8 and 16), `long` (1,024 to 65,536 positions) and `wide` (1,536 channels). The command prints tables;
the JSON file contains every time. First, "xla" and, where it runs, "mosaic" are compared with the definition in
float64; if one is wrong, nothing is timed and the exit code is 1. Implementations that do not fit in memory or disagree
with "xla" are left out. The packages `jax-linear-attention` and `mamba-ssm` are timed on a GPU if they are installed.
"""

import argparse
import functools
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan import pallas_mosaic, selective_scan

from kernels.benchmarks import baselines, command_line, machine, tables
from kernels.benchmarks.baselines import PASSES, Program

SHAPE_LISTS = {
    "target": ["4x196x512x16x1", "4x1024x512x16x1"],
    "es2d": ["24x784x2048x16x4", "24x196x2048x16x4", "24x49x2048x16x4"],
    "long": [f"1x{length}x{channels}x16x1" for channels in (512, 2048) for length in (1024, 4096, 16384, 65536)],
    "wide": [f"8x{length}x1536x16x1" for length in (1024, 4096, 16384)],
}
CHECKED_SHAPES = ["2x64x256x16x2", "3x37x150x5x3", "1x512x200x16x1"]  # a small shape, an odd one, and one in segments


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse a shape of the command line, for example 24x196x2048x16x4."""
    shape = tuple(int(n) for n in text.split("x") if n.isdigit())
    if len(shape) != 5 or "x".join(map(str, shape)) != text or 0 in shape:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither one of {', '.join(SHAPE_LISTS)} nor a shape like 24x196x2048x16x4: "
            "batch x length x channels x states x groups"
        )
    return shape


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """Parse names of lists and shapes, separated by commas."""
    return [parse_shape(shape) for key in text.split(",") for shape in SHAPE_LISTS.get(key, [key])]


def random_inputs(shape: tuple[int, ...], dtype: Any) -> dict[str, jax.Array]:
    """Make random inputs, with the step sizes and decay rates of Mamba at the start of training."""
    batch, length, channels, states, groups = shape
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), channels))
    return {
        "x": normal(batch, length, channels),
        "delta": 0.1 * normal(batch, length, channels),
        "A": -jnp.tile(jnp.arange(1.0, states + 1), (channels, 1)),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": jnp.ones(channels),
        "delta_bias": jnp.asarray(np.log(np.expm1(step)), jnp.float32),
    }


def implementations(shape: tuple[int, ...], dtype: Any) -> list[str]:
    """Return the names of our implementations that can run on this machine, "xla" first."""
    return ["xla"] if pallas_mosaic.obstacle(dtype, shape[3]) else ["xla", "mosaic"]


def difference(actual: Any, expected: Any) -> float:
    """Return the largest difference over all arrays, relative to the largest value of each; NaN if any value is NaN."""

    def relative(a: Any, b: Any) -> float:
        a, b = (jnp.asarray(array, jnp.float32) for array in (a, b))
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    return float(np.max(jax.tree.leaves(jax.tree.map(relative, actual, expected))))


def inputs_and_cotangents(
    shape: tuple[int, ...], dtype: Any
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Make random values of every argument of the scan, and cotangents of y and the final state."""
    batch, _, channels, states, _ = shape
    rng = np.random.default_rng(2)
    args = random_inputs(shape, dtype)
    args |= {
        "delta": 20 * args["delta"],
        "z": jnp.asarray(rng.standard_normal(args["x"].shape), dtype),
        "initial_state": jnp.asarray(rng.standard_normal((batch, channels, states)), dtype),
    }
    return args, (
        jnp.asarray(rng.standard_normal(args["x"].shape), dtype),
        args["initial_state"].astype(jnp.float32),
    )


def results(implementation: str, reverse: bool, args: dict[str, Any], cotangents: Any) -> dict[str, jax.Array]:
    """Compute the results of the scan and all gradients, by name."""
    options: dict[str, Any] = {"return_final_state": True, "reverse": reverse, "implementation": implementation}
    (y, state), vjp = jax.vjp(lambda args: selective_scan(**args, **options), args)
    return {"y": y, "final state": state} | {f"gradient of {n}": g for n, g in vjp(cotangents)[0].items()}


compiled_results = jax.jit(results, static_argnums=(0, 1))


def errors(actual: dict[str, jax.Array], reverse: bool, args: dict[str, Any], cotangents: Any) -> dict[str, float]:
    """Compute the errors of `results` relative to the definition in float64 on the CPU, by name."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays = jax.tree.map(lambda array: np.asarray(array, np.float64), (args, cotangents))
        exact = compiled_results("reference", reverse, *arrays)
    return {name: difference(actual[name], np.asarray(exact[name], np.float32)) for name in actual}


def tolerance(name: str, dtype: Any) -> float:
    """Return the largest accepted error of a result or gradient with this name."""
    return 2e-2 if dtype != jnp.float32 else 1e-4 if name.startswith("gradient") else 1e-5


def check(dtype: Any) -> tuple[dict[str, Any], str | None]:
    """Return the errors of our implementations by name and shape, and a message if one exceeds its tolerance."""
    all_errors: dict[str, Any] = {}
    for key in CHECKED_SHAPES:
        shape = parse_shape(key)
        case = inputs_and_cotangents(shape, dtype)
        for name in implementations(shape, dtype):
            all_errors.setdefault(name, {})[key] = errors(compiled_results(name, False, *case), False, *case)
            for array_name, error in all_errors[name][key].items():
                if not error <= tolerance(array_name, dtype):
                    return all_errors, (
                        f'"{name}" is wrong on this machine, so nothing was timed: at {key}, its {array_name} differs'
                        f" from the definition's by {error:.1g}, more than {tolerance(array_name, dtype):.0e}."
                    )
    return all_errors, None


def jax_contestants(shape: tuple[int, ...], dtype: Any) -> dict[str, Callable[..., Program]]:
    """Return the contestants written in JAX, "xla" first, as functions that make their programs."""
    ours = {name: functools.partial(selective_scan, implementation=name) for name in implementations(shape, dtype)}
    scans = ours | {"lax.scan": baselines.lax_scan, "associative_scan": baselines.associative_scan}
    return {name: baselines.jax_program(scan) for name, scan in scans.items()}


def peers() -> tuple[dict[str, Callable[..., Program]], dict[str, str]]:
    """Return the scans of other packages that can run on this machine, and why others are left out."""
    available, left_out = {}, {}
    for name, load in baselines.PEERS.items():
        try:
            if jax.default_backend() != "gpu":
                raise ImportError("it needs a GPU")
            available[name] = load()
        except ImportError as error:
            left_out[name] = str(error)
    return available, left_out


def measure(
    shape: tuple[int, ...],
    dtype: Any,
    contestants: dict[str, Callable[..., Program]],
    seconds: float,
    memory: float,
    expected: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measure the time of contestants in turns.

    Args:
        shape: Batch, length, channels, states and groups.
        dtype: Dtype of the sequences.
        contestants: Functions that make the programs, by name.
        seconds: Time for all turns; there are 3 to 15 turns.
        memory: Largest temporary memory of a contestant, in GiB.
        expected: Expected results by pass; missing ones are set to those of the first contestant.

    Returns:
        One row per contestant and pass, with the seconds of its compilation and of its turns, or why it was left out.
    """
    args = random_inputs(shape, dtype)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(args["x"].shape, np.float32), dtype)
    rows, ready = [], []
    for name, make_program in contestants.items():
        for pass_name, backward in PASSES.items():
            row: dict[str, Any] = {"shape": shape, "dtype": jnp.dtype(dtype).name, "name": name, "pass": pass_name}
            rows.append(row)
            start = time.perf_counter()
            try:
                program = make_program(args, dy, backward)
            except ValueError as error:
                row["left_out"] = str(error)
                continue
            row["compile_seconds"] = time.perf_counter() - start
            row["temporary_bytes"] = program.temporary_bytes
            if (program.temporary_bytes or 0) > memory * 2**30:
                row["left_out"] = f"needs {program.temporary_bytes / 2**30:.0f} GiB"
                continue
            program.wait_for(program.run())
            start = time.perf_counter()
            result = program.wait_for(program.run())
            call_seconds, result = time.perf_counter() - start, program.results(result)
            row["disagreement"] = difference(result, expected.setdefault(pass_name, result))
            if not row["disagreement"] <= (1e-3 if dtype == jnp.float32 else 5e-2):
                row["left_out"] = f"differs from xla by {row['disagreement']:.1g}"
                continue
            row["seconds"] = []
            on_gpu = jax.default_backend() == "gpu"
            calls = min(10, 1 + int(0.02 / call_seconds)) if on_gpu else 1  # launching a single call would add time
            ready.append((program, calls, row["seconds"]))
            del result
    end, turns = time.monotonic() + seconds, 0
    while turns < 3 or (turns < 15 and time.monotonic() < end):
        for program, calls, times in ready:
            program.wait_for(program.run())  # untimed, as the previous program has changed caches and memory
            start = time.perf_counter()
            for _ in range(calls):
                result = program.run()
            program.wait_for(result)
            times.append((time.perf_counter() - start) / calls)
            del result
        turns += 1
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the time of forward + backward against length, both logarithmic, for each number of channels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if PASSES[row["pass"]] and row["shape"][0] == 1 and "seconds" in row]
    widths = sorted({row["shape"][2] for row in rows})
    figure, axes = plt.subplots(1, len(widths), figsize=(4.2 * len(widths), 3.4), sharey=True, squeeze=False)
    for axis, width in zip(axes[0], widths, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [r for r in rows if r["name"] == name and r["shape"][2] == width]
            times = [1e3 * statistics.median(r["seconds"]) for r in points]
            axis.loglog([r["shape"][1] for r in points], times, "o-", base=2, label=name)
        axis.set(title=f"{width} channels, 16 states", xlabel="positions", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_line.parser(__doc__)
    shapes_help = "Shapes and names of lists, separated by commas; the default is target,es2d,long."
    parser.add_argument("--shapes", type=parse_shapes, default="target,es2d,long", help=shapes_help)
    dtype_help = "Dtype of the sequences; the default is float32, the others are meant for GPUs."
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help=dtype_help)
    seconds_help = "Time for all turns of one shape, in seconds; the default is 30."
    parser.add_argument("--seconds", type=float, default=30, help=seconds_help)
    memory_help = "Largest temporary memory of an implementation, in GiB; the default is 8."
    parser.add_argument("--memory", type=float, default=8, help=memory_help)
    parser.add_argument("--json", type=Path, help="JSON file to write the results to; none by default.")
    picture_help = "Image file for a plot of time against length, from the shapes with batch 1; none by default."
    parser.add_argument("--picture", type=Path, help=picture_help)
    options = parser.parse_args(arguments)
    dtype = jnp.dtype(options.dtype)
    result: dict[str, Any] = {"part": "scan", **machine.describe(), "rows": []}

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    result["errors"], message = check(dtype)
    save()
    if message:
        print(message, file=sys.stderr)
        return 1
    other_contestants, left_out = peers()
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    result["versions"] |= {name: importlib.metadata.version(name) for name in other_contestants}
    result["rates"] = machine.rates()
    for shape in options.shapes:
        contestants = jax_contestants(shape, dtype) | other_contestants
        rows = measure(shape, dtype, contestants, options.seconds, options.memory, {})
        print(tables.scan_table(rows, result["rates"]), "\n", flush=True)
        result["rows"] += rows
        save()
    if options.picture:
        draw(result["rows"], options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
