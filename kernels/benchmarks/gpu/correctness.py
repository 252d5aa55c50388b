"""The kernels against the definition in float64 on the CPU, and against themselves a second time."""

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

# Shape, dtype, and what else: "reverse", "pmap", "shard_map", or the arguments that are not given.
CASES = [
    "2x64x256x16x2 float32",
    "2x64x256x16x2 bfloat16",
    "2x37x64x1x1 float32",
    "3x37x150x5x3 float32",
    "3x37x150x5x3 float32 reverse",
    "3x37x150x5x3 bfloat16 reverse",
    "2x64x256x16x2 float32 D,z,delta_bias,initial_state",
    "3x49x2048x16x4 float32",  # ES2D at patch sizes 16, 8 and 4, with enough sequences not to be cut into segments
    "3x196x2048x16x4 float32",
    "3x784x2048x16x4 float32",
    "3x196x2048x16x4 bfloat16",
    "1x512x200x16x1 float32",  # in segments
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
SMALL = ["1x3x4x2x2 float32", "1x9x4x1x1 bfloat16 reverse", "1x3x4x2x1 float32 pmap", "1x3x4x2x1 float32 shard_map"]
PARAMETERS = ("A", "D", "delta_bias")


def cases(options: Options) -> Cases:
    """A row for each case."""
    for case in SMALL if options.rehearse else CASES:
        yield case, functools.partial(check, *case.split())


def check(shape_key: str, dtype_name: str, more: str = "") -> Row:
    """The errors of a scan and all its gradients, and whether a second run gives the same bits."""
    shape, dtype = selective_scan.parse_shape(shape_key), jnp.dtype(dtype_name)
    name = selective_scan.implementations(shape, dtype)[-1]
    args, cotangents = selective_scan.with_everything(shape, dtype)
    reverse = more == "reverse"
    if more not in ("", "reverse", "pmap", "shard_map"):
        args = {of: array for of, array in args.items() if of not in more.split(",")}
    function = functools.partial(selective_scan.results, name, reverse)
    if more == "pmap":
        function = under_pmap(function)
    elif more == "shard_map":
        function = under_shard_map(function)
    began = time.perf_counter()
    compiled = jax.jit(function).lower(args, cotangents).compile()
    compile_seconds = time.perf_counter() - began
    found, again = (jax.tree.map(np.asarray, compiled(args, cotangents)) for _ in range(2))
    errors = selective_scan.errors(found, reverse, args, cotangents)
    wrong = [of for of, error in errors.items() if not error <= selective_scan.tolerance(of, dtype)]
    row: Row = {
        "implementation": name,
        "error of results": max(error for of, error in errors.items() if not of.startswith("gradient")),
        "tolerance of results": selective_scan.tolerance("y", dtype),
        "error of gradients": max(error for of, error in errors.items() if of.startswith("gradient")),
        "tolerance of gradients": selective_scan.tolerance("gradient", dtype),
        "bit-equal": all(found[of].tobytes() == again[of].tobytes() for of in found),
        "compile_seconds": compile_seconds,
        "errors": errors,
    }
    if wrong:
        row["error"] = f"{', '.join(wrong)} differ from the definition's by up to {max(errors[of] for of in wrong):.1g}"
    elif not row["bit-equal"]:
        row["error"] = "a second run gave other bits"
    return row


def under_pmap(function: Any) -> Any:
    """`selective_scan.results` with the batch divided over all devices."""

    def divided(args: dict[str, Any], cotangents: Any) -> dict[str, Any]:
        count = jax.local_device_count()
        each = jax.tree.map(lambda array: array.reshape(count, -1, *array.shape[1:]), (_sequences(args), cotangents))
        found = jax.pmap(
            lambda sequences, parameters, cotangents: function(sequences | parameters, cotangents), in_axes=(0, None, 0)
        )(each[0], _parameters(args), each[1])
        return _together(found)

    return divided


def under_shard_map(function: Any) -> Any:
    """The same by the other means."""
    over_devices, everywhere = PartitionSpec("devices"), PartitionSpec()
    divided = jax.shard_map(
        lambda sequences, parameters, cotangents: jax.tree.map(
            lambda array: array[None], function(sequences | parameters, cotangents)
        ),
        mesh=Mesh(np.array(jax.devices()), ("devices",)),
        in_specs=(over_devices, everywhere, over_devices),
        out_specs=over_devices,
        check_vma=False,
    )
    return lambda args, cotangents: _together(divided(_sequences(args), _parameters(args), cotangents))


def _sequences(args: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in args.items() if name not in PARAMETERS}


def _parameters(args: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in args.items() if name in PARAMETERS}


def _together(found: dict[str, Any]) -> dict[str, Any]:
    """What all devices found, (devices, ...): gradients of what they share are summed, the rest has a batch axis."""
    shared = {f"gradient of {name}" for name in PARAMETERS}
    return {
        name: array.sum(0) if name in shared else array.reshape(-1, *array.shape[2:]) for name, array in found.items()
    }
