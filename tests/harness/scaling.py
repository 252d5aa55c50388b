"""Measure how training scales with the number of devices.

    python -m tests.harness.scaling --config=quickstart --devices=1,2,4

Every number of devices is measured in a separate process, which repeats the update of one batch of random images.
Without GPUs, the devices are emulated on the CPU cores, which shows the overhead only.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate

from iumad_jax import cli
from iumad_jax.errors import UserError

_OBJECTS = 10


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""

    def act(values: flags.FlagValues) -> str:
        return json.dumps(_measure(values)) if values.here else _compare(values, arguments)

    return cli.execute(str(__doc__), arguments, _define, act)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_list("devices", "1,2,4,8", "Numbers of devices, separated by commas.", flag_values=values)
    flags.register_validator("devices", _are_counts, "give whole numbers from 1, separated by commas.", values)
    flags.DEFINE_float("seconds", 20, "Duration of every measurement in seconds.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool(
        "here", False, "Measure in this process, on all of its devices, and print JSON.", flag_values=values
    )


def _are_counts(numbers: list[str]) -> bool:
    return bool(numbers) and all(number.isdecimal() and int(number) > 0 for number in numbers)


def _compare(values: flags.FlagValues, arguments: list[str]) -> str:
    """Measure every number of devices in a separate process and return the table."""
    rows: list[list[Any]] = []
    (config, _), first = cli.config_and_workdir(values), 0.0
    for number in values.devices:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(int(number)))), "JAX_NUM_CPU_DEVICES": number}
        command = [sys.executable, "-m", "tests.harness.scaling", *arguments[1:], "--here"]
        process = subprocess.run(command, env=os.environ | {"NPROC": "8"} | environment, stdout=subprocess.PIPE)
        if process.returncode:
            raise UserError(
                f"--devices={number}: measuring failed with exit code {process.returncode}; see the output above."
            )
        kind, devices, seconds = json.loads(process.stdout)
        if devices != int(number):
            raise UserError(f"--devices contains {number}, but only {devices} devices exist; give at most {devices}.")
        first = first or seconds * devices
        share = first / devices / seconds if kind != "cpu" else first / rows[0][1] / seconds if rows else 1.0
        rows.append([kind, devices, 1e3 * seconds, config.train.batch_size / seconds, share])
    relative = "images/s relative to the first row" if rows[0][0] == "cpu" else "efficiency relative to the first row"
    return tabulate(
        rows, ["", "devices", "ms/update", "images/s", relative], "github", floatfmt=("", "", ".1f", ".1f", ".3f")
    )


def _measure(values: flags.FlagValues) -> tuple[str, int, float]:
    """Return the kind and the number of devices, and the median seconds per update."""
    import jax

    from iumad_jax import config as configs
    from iumad_jax import methods
    from iumad_jax.data.batches import single_update
    from iumad_jax.models.backbone import FeatureExtractor
    from iumad_jax.runtime import devices
    from iumad_jax.shapes import Batch
    from iumad_jax.training.optimization import make_optimizer
    from iumad_jax.training.update import initial_state, make_update

    config, rng = values.config, np.random.default_rng(0)
    count, size, grid = config.train.batch_size, config.input.size, config.backbone.grid
    extractor, image = (
        FeatureExtractor(config.backbone.name, grid, config.backbone.levels),
        jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
    )
    features, _ = jax.eval_shape(extractor.init_with_output, jax.random.key(0), image)
    modalities = configs.modalities(config)

    def random(*shape: int) -> Any:
        return rng.standard_normal((count, *shape)).astype(np.float32)

    objects: Any = rng.integers(0, _OBJECTS, count).astype(np.int32)
    batch = Batch(
        {m: random(grid**2, features.shape[-1]) for m in modalities},
        {m: 128 + 40 * random(size, size, 3) for m in modalities},
        objects,
    )
    method, optimizer = methods.build(config.method, config), make_optimizer(config.train)
    update, device_batches = make_update(method, optimizer), single_update(batch)
    variables = method.grow(jax.jit(method.init)(jax.random.key(0), batch), _OBJECTS, jax.random.key(0))
    state = devices.replicate(initial_state(variables, optimizer, 0, []))
    durations: list[float] = []
    start = time.perf_counter()
    while not durations or time.perf_counter() - start < values.seconds:
        before = time.perf_counter()
        state, scalars = update(state, device_batches, jax.random.key(1), np.full(1, 1e-4, np.float32))
        jax.block_until_ready(scalars)
        durations.append(time.perf_counter() - before)
        if len(durations) == 1:  # the first update includes compilation
            start = time.perf_counter()
    return jax.devices()[0].device_kind, jax.device_count(), float(np.median(durations[1:] or durations))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
