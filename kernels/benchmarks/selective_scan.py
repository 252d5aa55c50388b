"""Times the selective scan, forward and forward + backward, against what JAX has, in turns within one run.

    python -m kernels.benchmarks.selective_scan [--shapes=target,long] [--json=out.json] [--picture=out.png]

Shapes are batch x length x channels x states x groups, or the name of a list: `target`, `es2d` (the Mamba decoder's, at
patch sizes 4, 8 and 16), `long` (1,024 to 65,536 positions). On a GPU, `--dtype=bfloat16` also makes sense. Prints a
table; the JSON holds every time. Before anything is timed, "xla" and, where it runs, "mosaic" are compared with the
definition in float64; exit code 1 if one is wrong. What does not fit in memory is left out, and so is whatever else
disagrees with "xla". The packages `jax-linear-attention` and `mamba-ssm` are timed on a GPU if they are installed.
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

from kernels.benchmarks import baselines, machine, tables
from kernels.benchmarks.baselines import PASSES, Program

LISTS = {
    "target": ["4x196x512x16x1", "4x1024x512x16x1"],
    "es2d": ["24x784x2048x16x4", "24x196x2048x16x4", "24x49x2048x16x4"],
    "long": [f"1x{length}x{channels}x16x1" for channels in (512, 2048) for length in (1024, 4096, 16384, 65536)],
    "wide": [f"8x{length}x1536x16x1" for length in (1024, 4096, 16384)],
}
CHECKED = ["2x64x256x16x2", "3x37x150x5x3", "1x512x200x16x1"]  # a small shape, an odd one, and one in segments


def parse_shape(text: str) -> tuple[int, ...]:
    """As it is written on the command line."""
    shape = tuple(int(n) for n in text.split("x") if n.isdigit())
    if len(shape) != 5 or "x".join(map(str, shape)) != text or 0 in shape:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither one of {', '.join(LISTS)} nor a shape like 24x196x2048x16x4: "
            "batch x length x channels x states x groups"
        )
    return shape


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """Names of lists, or shapes, separated by commas."""
    return [parse_shape(shape) for key in text.split(",") for shape in LISTS.get(key, [key])]


def inputs(shape: tuple[int, ...], dtype: Any) -> dict[str, jax.Array]:
    """At random, with step sizes and decay rates as Mamba has them at the start of training."""
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
    """Ours that can run here, "xla" first."""
    return ["xla"] if pallas_mosaic.obstacle(dtype, shape[3]) else ["xla", "mosaic"]


def difference(found: Any, expected: Any) -> float:
    """The largest over all arrays, each relative to its largest value; NaN where there is one."""

    def relative(a: Any, b: Any) -> float:
        a, b = (jnp.asarray(array, jnp.float32) for array in (a, b))
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    return float(np.max(jax.tree.leaves(jax.tree.map(relative, found, expected))))


def with_everything(shape: tuple[int, ...], dtype: Any) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Every argument of the scan, at random, and cotangents of y and the final state."""
    batch, _, channels, states, _ = shape
    rng = np.random.default_rng(2)
    args = inputs(shape, dtype)
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
    """Everything that the scan returns, and every gradient, by name."""
    options: dict[str, Any] = {"return_final_state": True, "reverse": reverse, "implementation": implementation}
    (y, state), vjp = jax.vjp(lambda args: selective_scan(**args, **options), args)
    return {"y": y, "final state": state} | {f"gradient of {n}": g for n, g in vjp(cotangents)[0].items()}


compiled_results = jax.jit(results, static_argnums=(0, 1))


def errors(found: dict[str, jax.Array], reverse: bool, args: dict[str, Any], cotangents: Any) -> dict[str, float]:
    """Of what `results` found, from the definition's in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays = jax.tree.map(lambda array: np.asarray(array, np.float64), (args, cotangents))
        exact = compiled_results("reference", reverse, *arrays)
    return {name: difference(found[name], np.asarray(exact[name], np.float32)) for name in found}


def tolerance(name: str, dtype: Any) -> float:
    """Of the error of a result or, by its name, a gradient."""
    return 2e-2 if dtype != jnp.float32 else 1e-4 if name.startswith("gradient") else 1e-5


def check(dtype: Any) -> tuple[dict[str, Any], str | None]:
    """The errors of ours by implementation and shape, and what is wrong with them, if anything is."""
    found: dict[str, Any] = {}
    for key in CHECKED:
        shape = parse_shape(key)
        case = with_everything(shape, dtype)
        for name in implementations(shape, dtype):
            found.setdefault(name, {})[key] = errors(compiled_results(name, False, *case), False, *case)
            for of, error in found[name][key].items():
                if not error <= tolerance(of, dtype):
                    return found, (
                        f'"{name}" is wrong here, so that nothing was timed: at {key} its {of} differs from the'
                        f" definition's by {error:.1g}, more than {tolerance(of, dtype):.0e}"
                    )
    return found, None


def contestants(shape: tuple[int, ...], dtype: Any) -> dict[str, Callable[..., Program]]:
    """What is timed besides peers, "xla" first."""
    ours = {name: functools.partial(selective_scan, implementation=name) for name in implementations(shape, dtype)}
    scans = ours | {"lax.scan": baselines.lax_scan, "associative_scan": baselines.associative_scan}
    return {name: baselines.in_jax(scan) for name, scan in scans.items()}


def peers() -> tuple[dict[str, Callable[..., Program]], dict[str, str]]:
    """Other packages' scans that can run here, and why the others cannot."""
    found, left_out = {}, {}
    for name, load in baselines.PEERS.items():
        try:
            if jax.default_backend() != "gpu":
                raise ImportError("it needs a GPU")
            found[name] = load()
        except ImportError as error:
            left_out[name] = str(error)
    return found, left_out


def measure(
    shape: tuple[int, ...],
    dtype: Any,
    prepare: dict[str, Callable[..., Program]],
    seconds: float,
    memory: float,
    expected: dict[str, Any],
) -> list[dict[str, Any]]:
    """Times contestants in turns.

    Args:
        shape: batch, length, channels, states, groups.
        dtype: of the sequences.
        prepare: makes each contestant's program.
        seconds: for all turns; there are 3 to 15.
        memory: GiB that a contestant may need for itself.
        expected: the results by pass that all must find; where there are none, the first contestant's are put there.

    Returns:
        One row for each contestant and pass: seconds of its compilation and of its turns, or why it was left out.
    """
    args = inputs(shape, dtype)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(args["x"].shape, np.float32), dtype)
    rows, ready = [], []
    for name, program_of in prepare.items():
        for of_pass, backward in PASSES.items():
            row: dict[str, Any] = {"shape": shape, "dtype": jnp.dtype(dtype).name, "name": name, "pass": of_pass}
            rows.append(row)
            began = time.perf_counter()
            try:
                program = program_of(args, dy, backward)
            except ValueError as error:
                row["left_out"] = str(error)
                continue
            row["compile_seconds"] = time.perf_counter() - began
            row["temporary_bytes"] = program.temporary_bytes
            if (program.temporary_bytes or 0) > memory * 2**30:
                row["left_out"] = f"needs {program.temporary_bytes / 2**30:.0f} GiB"
                continue
            program.wait_for(program.run())
            start = time.perf_counter()
            result = program.wait_for(program.run())
            once, result = time.perf_counter() - start, program.results(result)
            row["disagreement"] = difference(result, expected.setdefault(of_pass, result))
            if not row["disagreement"] <= (1e-3 if dtype == jnp.float32 else 5e-2):
                row["left_out"] = f"differs from xla by {row['disagreement']:.1g}"
                continue
            row["seconds"] = []
            calls = min(10, 1 + int(0.02 / once)) if jax.default_backend() == "gpu" else 1  # to launch one takes time
            ready.append((program, calls, row["seconds"]))
            del result
    end, turns = time.monotonic() + seconds, 0
    while turns < 3 or (turns < 15 and time.monotonic() < end):
        for program, calls, times in ready:
            program.wait_for(program.run())  # what ran before has left caches and memory in its own state
            start = time.perf_counter()
            for _ in range(calls):
                result = program.run()
            program.wait_for(result)
            times.append((time.perf_counter() - start) / calls)
            del result
        turns += 1
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward + backward against length, both logarithmic, for each number of channels."""
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
    """Checks, measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default="target,es2d,long", help=parse_shapes.__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=30, help="for the turns of one shape")
    parser.add_argument("--memory", type=float, default=8, help="GiB that an implementation may need for itself")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--picture", type=Path, help="where the picture of the list `long` goes")
    options = parser.parse_args(arguments)
    dtype = jnp.dtype(options.dtype)
    result: dict[str, Any] = {"part": "scan", **machine.describe(), "rows": []}

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    result["errors"], wrong = check(dtype)
    save()
    if wrong:
        print(wrong, file=sys.stderr)
        return 1
    found, left_out = peers()
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    result["versions"] |= {name: importlib.metadata.version(name) for name in found}
    result["rates"] = machine.rates()
    for shape in options.shapes:
        rows = measure(shape, dtype, contestants(shape, dtype) | found, options.seconds, options.memory, {})
        print(tables.of_scans(rows, result["rates"]), "\n", flush=True)
        result["rows"] += rows
        save()
    if options.picture:
        draw(result["rows"], options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
