"""Errors of the kernels relative to the definition in float64 on the CPU, and equality of two runs."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kernels.benchmarks import selective_scan
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

# Shape, dtype and variation: "reverse", "pmap", "shard_map", or the arguments to leave out.
CASES = [
    "2x64x256x16x2 float32",
    "2x64x256x16x2 bfloat16",
    "2x37x64x1x1 float32",
    "3x37x150x5x3 float32",
    "3x37x150x5x3 float32 reverse",
    "3x37x150x5x3 bfloat16 reverse",
    "2x64x256x16x2 float32 D,z,delta_bias,initial_state",
    "3x49x2048x16x4 float32",  # ES2D at patch sizes 16, 8 and 4, with too many sequences for segments
    "3x196x2048x16x4 float32",
    "3x784x2048x16x4 float32",
    "3x196x2048x16x4 bfloat16",
    "1x512x200x16x1 float32",  # cut into segments
    "1x512x200x16x1 float32 reverse",
    "1x512x200x16x1 bfloat16",
    "2x40x136x32x1 float32",
    "2x40x72x33x1 float32",
    "2x40x72x64x1 float32",
    "2x40x72x128x1 float32",
    "2x40x72x128x1 bfloat16",
    "4x64x256x16x2 float32 pmap",
    "4x64x256x16x2 float32 shard_map",
]
SMALL_CASES = [
    "1x3x4x2x2 float32",
    "1x9x4x1x1 bfloat16 reverse",
    "1x3x4x2x1 float32 pmap",
    "1x3x4x2x1 float32 shard_map",
]
PARAMETERS = ("A", "D", "delta_bias")


def cases(options: Options) -> Cases:
    """Yield one row per case."""
    for case in SMALL_CASES if options.rehearse else CASES:
        yield case, functools.partial(check, *case.split())


def check(shape_key: str, dtype_name: str, variation: str = "") -> Row:
    """Compute the errors of a scan and of all its gradients, and whether a second run is bit-equal."""
    shape, dtype = selective_scan.parse_shape(shape_key), jnp.dtype(dtype_name)
    name = selective_scan.implementations(shape, dtype)[-1]
    args, cotangents = selective_scan.inputs_and_cotangents(shape, dtype)
    reverse = variation == "reverse"
    if variation not in ("", "reverse", "pmap", "shard_map"):
        args = {argument: array for argument, array in args.items() if argument not in variation.split(",")}
    compute = functools.partial(selective_scan.results, name, reverse)
    if variation == "pmap":
        compute = with_pmap(compute)
    elif variation == "shard_map":
        compute = with_shard_map(compute)
    start = time.perf_counter()
    compiled = jax.jit(compute).lower(args, cotangents).compile()
    compile_seconds = time.perf_counter() - start
    first_run, second_run = (jax.tree.map(np.asarray, compiled(args, cotangents)) for _ in range(2))
    errors = selective_scan.errors(first_run, reverse, args, cotangents)
    wrong = [array for array, error in errors.items() if not error <= selective_scan.tolerance(array, dtype)]
    row: Row = {
        "implementation": name,
        "error of results": max(error for array, error in errors.items() if not array.startswith("gradient")),
        "tolerance of results": selective_scan.tolerance("y", dtype),
        "error of gradients": max(error for array, error in errors.items() if array.startswith("gradient")),
        "tolerance of gradients": selective_scan.tolerance("gradient", dtype),
        "bit-equal": all(first_run[array].tobytes() == second_run[array].tobytes() for array in first_run),
        "compile_seconds": compile_seconds,
        "errors": errors,
    }
    if wrong:
        largest = max(errors[array] for array in wrong)
        row["error"] = f"{', '.join(wrong)} differ from the definition's by up to {largest:.1g}"
    elif not row["bit-equal"]:
        row["error"] = "a second run gave different bits"
    return row


def with_pmap(compute: Any) -> Any:
    """Divide the batch of `selective_scan.results` over all devices with `pmap`."""

    def divided(args: dict[str, Any], cotangents: Any) -> dict[str, Any]:
        count = jax.local_device_count()
        per_device = jax.tree.map(
            lambda array: array.reshape(count, -1, *array.shape[1:]), (_sequences(args), cotangents)
        )
        results = jax.pmap(
            lambda sequences, parameters, cotangents: compute(sequences | parameters, cotangents), in_axes=(0, None, 0)
        )(per_device[0], _parameters(args), per_device[1])
        return _combine(results)

    return divided


def with_shard_map(compute: Any) -> Any:
    """Divide the batch of `selective_scan.results` over all devices with `shard_map`."""
    over_devices, everywhere = PartitionSpec("devices"), PartitionSpec()
    divided = jax.shard_map(
        lambda sequences, parameters, cotangents: jax.tree.map(
            lambda array: array[None], compute(sequences | parameters, cotangents)
        ),
        mesh=Mesh(np.array(jax.devices()), ("devices",)),
        in_specs=(over_devices, everywhere, over_devices),
        out_specs=over_devices,
        check_vma=False,
    )
    return lambda args, cotangents: _combine(divided(_sequences(args), _parameters(args), cotangents))


def _sequences(args: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in args.items() if name not in PARAMETERS}


def _parameters(args: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in args.items() if name in PARAMETERS}


def _combine(results: dict[str, Any]) -> dict[str, Any]:
    """Combine the results of all devices, (devices, ...): sum the gradients of parameters, join all other batches."""
    shared = {f"gradient of {name}" for name in PARAMETERS}
    return {
        name: array.sum(0) if name in shared else array.reshape(-1, *array.shape[2:]) for name, array in results.items()
    }
