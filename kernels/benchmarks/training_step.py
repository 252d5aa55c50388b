"""Measure the time of a training update of IB-IUMAD, in turns with variants of it and with a lower bound.

    python -m kernels.benchmarks.training_step --config=quickstart --batch_size=8 --seconds=120

One variant has `jax.lax.scan` in place of `selective_scan`, and must have the same losses; if the config has dropout,
another has none. The "floor" estimates a lower bound: the operations that XLA counts, at the rate of a large matrix
product, and the scans alone, as XLA counts the body of a loop once.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import eyecandies, quickstart
from iumad_jax import config as configs
from iumad_jax import methods
from iumad_jax.data.batches import DeviceBatches, single_update
from iumad_jax.methods.method import Method
from iumad_jax.models import mamba
from iumad_jax.runtime import devices
from iumad_jax.shapes import Batch, Variables
from iumad_jax.training.optimization import step_optimizer
from iumad_jax.training.update import initial_state, make_update
from kernels.benchmarks import baselines, command_line, machine
from kernels.benchmarks.selective_scan import random_inputs

OBJECTS, CHANNELS = 10, 192
CONFIGS = {"quickstart": quickstart, "eyecandies": eyecandies}
SMALL = {
    "input.size": 32,
    "backbone.grid": 2,
    "model.width": 8,
    "model.heads": 2,
    "model.layers": 1,
    "model.hidden": 8,
    "model.patch_size": 16,
    "model.states": 1,
    "model.dropout": 0.0,
    "modality": "rgb",
    "train.optimizer": "sgd",
    "train.batch_size": 2,
}


class Update(NamedTuple):
    """Compiled update that always receives the same batch; the batch and the weights are noise."""

    run: Callable[[], jax.Array]  # starts the update and returns its loss without waiting for it
    compile_seconds: float
    flops: float  # as counted by XLA, which counts the body of a loop once and a kernel as nothing
    memory_bytes: int  # memory of arguments, results and temporary arrays, as assigned by XLA


def lax_scan(*args: jax.Array, delta_softplus: bool, implementation: str | None, **kwargs: jax.Array) -> jax.Array:
    """Compute `selective_scan` with `jax.lax.scan`."""
    assert delta_softplus
    return baselines.lax_scan(*args, **kwargs)


def chosen_config(options: argparse.Namespace, small: dict[str, Any]) -> ConfigDict:
    """Return the config that the flags of `command_line.training_parser` choose; --small sets the keys `small`."""
    config = CONFIGS[options.config].get_config()
    config.update_from_flattened_dict(small if options.small else {})
    config.train.batch_size = options.batch_size or config.train.batch_size
    return config


def random_batch(config: ConfigDict) -> Batch:
    """Make a batch of noise in the sizes of the config."""
    rng = np.random.default_rng(0)
    b, tokens, size = config.train.batch_size, config.backbone.grid**2, config.input.size
    modalities = configs.modalities(config)
    return Batch(
        {m: rng.standard_normal((b, tokens, CHANNELS)).astype(np.float32) for m in modalities},
        {m: rng.uniform(0, 255, (b, size, size, 3)).astype(np.float32) for m in modalities},
        rng.integers(0, OBJECTS, b).astype(np.int32),
    )


def on_devices(batch: Batch) -> DeviceBatches:
    """Copy a batch to all devices, each with its share, as the input of one update."""
    layout = NamedSharding(Mesh(np.array(jax.local_devices()), (devices.AXIS,)), PartitionSpec(devices.AXIS))
    return jax.device_put(single_update(batch), layout)


def random_variables(method: Method, batch: Batch) -> Variables:
    """Return variables of noise, because compiling the initialisation takes as long as compiling the update."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    noise = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes["params"])
    grown = method.grow(variables | {"params": noise}, OBJECTS, jax.random.key(0))
    return grown | ({"frozen": frozen} if (frozen := method.frozen()) else {})


def compile_update(config: ConfigDict, compiler_options: dict[str, Any] | None = None) -> Update:
    """Compile the update of a config, with a learning rate of zero. The options are those of XLA's compiler."""
    method, batch = methods.build(config.method, config), random_batch(config)
    optimizer = step_optimizer(method, config.train)
    variables = random_variables(method, batch)
    state = devices.replicate(initial_state(variables, optimizer, 0, []))
    key, rates = jax.random.key(1), np.zeros(1, np.float32)
    device_batches = on_devices(batch)
    lowered = make_update(method, optimizer).lower(state, device_batches, key, rates)
    start = time.perf_counter()
    update = lowered.compile(compiler_options)
    seconds = time.perf_counter() - start

    def run() -> jax.Array:
        nonlocal state
        state, scalars = update(state, device_batches, key, rates)
        return scalars["loss"]

    memory = update.memory_analysis()
    memory_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Update(run, seconds, lowered.cost_analysis()["flops"], memory_bytes - memory.alias_size_in_bytes)


def scan_passes(config: ConfigDict) -> list[Callable[[], Any]]:
    """Compile the scans of an update, forward and backward, one for each block of each Mamba decoder."""
    if config.method != "ib_iumad" or not config.model.mamba:
        return []
    side = -(-(config.input.size // config.model.patch_size) // 2)  # of a quarter of the grid, see `split_by_parity`
    shape = (config.train.batch_size, side**2, 4 * 2 * config.model.width, config.model.states, 4)
    args = random_inputs(shape, np.float32)
    run = baselines.jax_program(mamba.selective_scan)(args, args["x"], True).run
    return [run] * (config.model.layers * len(configs.modalities(config)))


def compile_with_scan(config: ConfigDict, scan: Callable[..., Any]) -> Update:
    """Compile the update of a config with another scan function."""
    original, mamba.selective_scan = mamba.selective_scan, scan
    try:
        return compile_update(config)
    finally:
        mamba.selective_scan = original


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = command_line.training_parser(__doc__, CONFIGS, seconds=120).parse_args(arguments)
    config = chosen_config(options, SMALL)
    updates = {"selective_scan": compile_update(config), "lax.scan": compile_with_scan(config, lax_scan)}
    if config.model.dropout:
        without_dropout = config.copy_and_resolve_references()
        without_dropout.model.dropout = 0.0
        updates["dropout 0"] = compile_update(without_dropout)
    times: dict[str, list[float]] = {name: [] for name in updates}
    scans, floors, rates = scan_passes(config), [], []
    end = time.monotonic() + options.seconds
    while len(floors) < 3 or time.monotonic() < end:
        losses = {}
        for name, variant in updates.items():
            start = time.perf_counter()
            losses[name] = np.asarray(variant.run())
            times[name].append(time.perf_counter() - start)
        np.testing.assert_allclose(losses["lax.scan"], losses["selective_scan"], rtol=1e-4, equal_nan=False)
        rates.append(machine.matrix_rate())
        start = time.perf_counter()
        jax.block_until_ready([scan() for scan in scans])
        floors.append(updates["selective_scan"].flops / rates[-1] + time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    update, seconds, floor = updates["selective_scan"], median.pop("selective_scan"), statistics.median(floors)
    variants = "".join(f", {other / seconds:.2f} times as long with {name}" for name, other in median.items())
    print(
        f"{options.config}, batch size {config.train.batch_size}: {seconds:.3g} s per update{variants}; floor"
        f" {floor:.3g} s ({update.flops / 1e9:.1f} GFLOP at {statistics.median(rates) / 1e9:.0f} GFLOP/s and the"
        f" scans), {floor / seconds:.0%} of the update; medians of {len(floors)} turns; compiled in"
        f" {update.compile_seconds:.3g} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
