"""Measure the time of UniAD's training update and of its prediction in this project and in PyTorch, in turns.

    python -m kernels.benchmarks.pytorch_uniad --config=quickstart --batch_size=8 --seconds=60 --json=out.json

Both run on the CPU, with the same network, weights, random features, optimiser and number of threads. The update has
dropout and jitter; the prediction takes the features of one image to its error map. PyTorch is timed as written and,
where it has a C++ compiler, compiled by `torch.compile`. It draws a mask for the dropout of attention weights for each
head, where this project draws one for all heads. Before timing, the error maps and the losses of four updates without
dropout and jitter are compared; if they differ, nothing is timed and the exit code is 1.

Run the command on an idle machine: the threads of both sides wait for each other many times, and PyTorch's spin while
they wait, which makes it up to a hundred times slower if another process occupies one of two cores.
"""

import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from iumad_jax import methods
from iumad_jax.runtime import devices
from iumad_jax.shapes import Variables
from iumad_jax.training.optimization import make_optimizer
from iumad_jax.training.update import initial_state, make_update
from kernels.benchmarks import command_line, machine, tables, training_step

CONTESTANTS = OURS, EAGER, COMPILED = "iumad_jax", "PyTorch", "PyTorch, compiled"
UPDATE, PREDICTION = "training update", "prediction"
SMALL = training_step.SMALL | {"backbone.grid": 8, "model.dropout": 0.1, "train.optimizer": "adamw"}
UPDATES, TOLERANCE = 4, 1e-4  # number of compared updates, and the largest relative difference

Programs = dict[str, Callable[[], Any]]  # by task, on the same batch: UPDATE returns its loss, PREDICTION an error map


def random_variables(config: ConfigDict) -> Variables:
    """Make noise in the shapes of our variables, of a size that keeps activations near 1."""
    rng = np.random.default_rng(1)
    init = methods.build(config.method, config).init
    shapes = jax.eval_shape(init, jax.random.key(0), training_step.random_batch(config))

    def noise(path: Any, leaf: Any) -> np.ndarray:
        scale = leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 1
        return np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)

    return {
        "params": jax.tree.map_with_path(noise, shapes["params"]),
        "statistics": jax.tree.map(
            lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(np.float32), shapes["statistics"]
        ),
    }


def our_programs(config: ConfigDict, variables: Variables) -> Programs:
    """Compile our programs; the prediction always uses the given weights."""
    method, batch = methods.build(config.method, config), training_step.random_batch(config)
    optimizer, key, rates = make_optimizer(config.train), jax.random.key(1), np.float32([config.train.learning_rate])
    state = devices.replicate(initial_state(variables, optimizer, 0, []))
    device_batches = training_step.on_devices(batch)
    image = jax.device_put(jax.tree.map(lambda array: array[:1], batch))
    weights = jax.device_put(variables)
    compiled_update = make_update(method, optimizer).lower(state, device_batches, key, rates).compile()
    compiled_prediction = jax.jit(method.predict).lower(weights, image).compile()

    def update() -> float:
        nonlocal state
        state, scalars = jax.block_until_ready(compiled_update(state, device_batches, key, rates))
        return float(scalars["loss"][0, 0])

    def predict() -> np.ndarray:
        (error_map,) = compiled_prediction(weights, image).maps.values()
        return np.asarray(error_map)

    return {UPDATE: update, PREDICTION: predict}


def pytorch_programs(config: ConfigDict, variables: Variables, compiled: bool = False) -> Programs:
    """Make PyTorch's programs, which are compiled when they are first called."""
    import torch

    from kernels.benchmarks import pytorch_networks

    features = jax.tree.map(torch.tensor, training_step.random_batch(config).features)

    def network() -> pytorch_networks.UniAD:
        return pytorch_networks.load(pytorch_networks.UniAD(config, training_step.CHANNELS), variables)

    return {
        UPDATE: pytorch_networks.training_update(network(), features, config.train, compiled),
        PREDICTION: pytorch_networks.prediction(network(), features, compiled),
    }


def difference(actual: Float[np.ndarray, "*n"] | float, expected: Float[np.ndarray, "*n"] | float) -> float:
    """Return the largest difference between two arrays, relative to the largest expected value."""
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def differences(config: ConfigDict) -> dict[str, float]:
    """Return the relative differences of PyTorch's results from ours without dropout and jitter, by name."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"model.dropout": 0.0, "model.jitter.probability": 0.0})
    variables = random_variables(config)
    ours, pytorch = our_programs(config, variables), pytorch_programs(config, variables)
    result = {"error map": difference(pytorch[PREDICTION](), ours[PREDICTION]())}
    losses = {f"loss in update {i + 1}": difference(pytorch[UPDATE](), ours[UPDATE]()) for i in range(UPDATES)}
    return result | losses


def prepare(config: ConfigDict) -> tuple[dict[str, Programs], dict[str, float], dict[str, str]]:
    """Compile the programs of all contestants and run each once.

    Returns:
        The programs and the seconds until they had run once, by contestant, and why others are left out.
    """
    variables = random_variables(config)
    contestants = {
        OURS: functools.partial(our_programs, config, variables),
        EAGER: functools.partial(pytorch_programs, config, variables),
        COMPILED: functools.partial(pytorch_programs, config, variables, compiled=True),
    }
    ready, first_seconds, left_out = {}, {}, {}
    for name, make_programs in contestants.items():
        start = time.perf_counter()
        try:
            programs = make_programs()
            for run in programs.values():
                run()
        except RuntimeError as error:  # that of torch.compile
            if name != COMPILED:
                raise
            left_out[name] = str(error).partition("\n")[0]
            continue
        ready[name], first_seconds[name] = programs, time.perf_counter() - start
    return ready, first_seconds, left_out


def measure(contestants: dict[str, Programs], seconds: float) -> dict[str, dict[str, list[float]]]:
    """Measure the times of all programs in turns, at least three.

    Args:
        contestants: Programs by name.
        seconds: Time for all turns.

    Returns:
        Seconds of every turn, by task and name.
    """
    times: dict[str, dict[str, list[float]]] = {
        task: {name: [] for name in contestants} for task in (UPDATE, PREDICTION)
    }
    end, turns = time.monotonic() + seconds, 0
    while turns < 3 or time.monotonic() < end:
        for task, by_name in times.items():
            for name, of_turns in by_name.items():
                run = contestants[name][task]
                run()  # untimed, as the previous program has changed caches, and its threads may still be spinning
                start = time.perf_counter()
                run()
                of_turns.append(time.perf_counter() - start)
        turns += 1
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Summarise the seconds of a task, by contestant: medians, and the time of PyTorch's faster form over ours."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = min(median for name, median in medians.items() if name != OURS) / medians[OURS]
    cells = {f"{name}, ms": 1e3 * medians[name] if name in medians else "not available" for name in CONTESTANTS}
    return cells | {"faster PyTorch / iumad_jax": ratio, "turns": len(times[OURS]), "seconds": times}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_line.training_parser(__doc__, training_step.CONFIGS, seconds=60)
    parser.add_argument("--json", type=Path, help="JSON file to write the results to; none by default.")
    options = parser.parse_args(arguments)
    if not importlib.util.find_spec("torch"):
        print("PyTorch is not installed; run pip install '.[peers]'.", file=sys.stderr)
        return 2
    import torch

    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(os.cpu_count() or 1)  # as many as XLA uses
    torch.manual_seed(0)
    config = training_step.chosen_config(options, SMALL)
    config.method = "uniad"
    result: dict[str, Any] = {"part": "pytorch_uniad", **machine.describe(), "differences": differences(config)}
    result["versions"]["torch"] = torch.__version__
    for name, error in result["differences"].items():
        if not error <= TOLERANCE:
            print(
                f"PyTorch's UniAD is not ours, so nothing was timed: its {name} differs by {error:.1g}, more than"
                f" {TOLERANCE:.0e}.",
                file=sys.stderr,
            )
            return 1
    contestants, result["first_seconds"], result["left_out"] = prepare(config)
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}")
    times = measure(contestants, options.seconds)
    tasks = {UPDATE: f"{UPDATE}, batch size {config.train.batch_size}", PREDICTION: f"{PREDICTION} of one image"}
    result["rows"] = {f"{options.config}, {text}": summary(times[task]) for task, text in tasks.items()}
    print(f"{tables.machine_text(result)}\n\n{tables.part_table(result['rows'])}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
