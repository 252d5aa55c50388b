"""Compute how storage and memory grow with the number of objects.

    python -m tests.harness.growth --config=quickstart --objects=10,1000,100000

Nothing is trained: the sizes follow from the shapes of all arrays, for a protocol that learns one object per step.
"""

import json
import sys
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _compute)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_list("objects", "10,1000,100000", "Numbers of objects, separated by commas.", flag_values=values)
    flags.DEFINE_integer("train", 1000, "Number of training images per object.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("test", 50, "Number of test images per object.", lower_bound=1, flag_values=values)


def _compute(values: flags.FlagValues) -> str:
    config, _ = cli.config_and_workdir(values)
    columns = [_sizes(config, int(number), values.train, values.test) for number in values.objects]
    rows = [[name, *(_format_bytes(column[name]) for column in columns)] for name in columns[0]]
    headers = ["", *(f"{int(number):,} objects" for number in values.objects)]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=["left", *["right"] * len(columns)])


def _format_bytes(value: float) -> str:
    for unit, factor in {"PB": 1e15, "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def _sizes(config: Any, objects: int, train: int, test: int) -> dict[str, float]:
    """Return the number of bytes of everything that is stored, by name."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    from iumad_jax import config as configs
    from iumad_jax import methods
    from iumad_jax.inference import thresholds
    from iumad_jax.models.backbone import FeatureExtractor
    from iumad_jax.report.tables import METRICS
    from iumad_jax.runtime.storage import as_json
    from iumad_jax.shapes import MAP_SIZE, Batch, capacity
    from iumad_jax.training.optimization import make_optimizer

    def size(tree: Any) -> float:
        return sum(float(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    side, grid, modalities = config.input.size, config.backbone.grid, configs.modalities(config)
    extractor = FeatureExtractor(config.backbone.name, grid, config.backbone.levels)

    def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    pixels = shaped((1, side, side, 3), np.float32)
    channels = jax.eval_shape(extractor.init_with_output, jax.random.key(0), pixels)[0].shape[-1]
    image = Batch(
        {m: shaped((1, grid**2, channels), np.float16) for m in modalities},
        {m: shaped(pixels.shape, np.uint8 if m == "rgb" else np.float16) for m in modalities},
        shaped((1,), np.int32),
    )
    truth = MAP_SIZE**2 * (3 * np.dtype(bool).itemsize + 3 + np.dtype(np.float32).itemsize)

    variants = methods.with_baselines(config)
    method = variants[config.method]
    initial = jax.eval_shape(method.init, jax.random.key(0), image)
    statistics, params = flatten_dict(initial["statistics"]), flatten_dict(initial["params"])
    heads = {path: array for path, array in params.items() if (*path[:-1], "objects") in statistics}
    params |= {path: shaped((*array.shape[:-1], capacity(objects)), array.dtype) for path, array in heads.items()}
    variables = initial | {"params": unflatten_dict(params)}
    room = sum(map(capacity, range(1, objects + 1)))  # of the heads in all snapshots
    optimizer = jax.eval_shape(make_optimizer(config.train).init, variables["params"])
    activations = jax.tree.leaves(jax.eval_shape(method.activations, variables, image))
    replayed = len(modalities) * (grid**2 * channels + 3 * config.continual.replay.image_size**2) * 2
    bank = config.memory_bank.megabytes * 2**20
    recognition = 4 * len(modalities) * channels * np.array([objects, len(modalities) * channels])

    rng, pairs = np.random.default_rng(0), objects * (objects + 1) / 2  # pairs of a step and an object learned by then
    values = {metric: rng.random() for metric in METRICS}
    spread = {"intervals": {m: [v, v] for m, v in values.items()}, "standard_errors": values}
    event = {"event": "evaluation", "step": objects, "object": "a" * 12, "method": config.method, **values, **spread}
    maps: Any = rng.random(test)
    good = thresholds.make_calibration(maps, maps, rng.random((test, 2)), 0)
    decision = json.dumps(thresholds.describe({"a" * 12: good, "b": good}, 0.995)["objects"]["a" * 12])
    numbers = len(variants) * len(METRICS)
    calibration = json.dumps(as_json(good._asdict()))

    sizes = {
        "prepared images": objects * (train * size(image) + test * (size(image) + truth)),
        "kept calibration images": objects * min(config.decisions.kept_images, train) * size(image),
        f"weights of {config.method}": size(variables),
        "state of the optimiser": size(optimizer),
        "state of iuf": sum(4.0 * leaf.shape[-1] ** 2 for leaf in activations),
        "state of replay": objects * ((config.continual.replay.rank + 1.0) * replayed + 4),
        "patches of memory_bank": objects * bank,
        "Gaussians of gaussian": 4.0 * objects * len(modalities) * (channels * (channels + 1) + 1),
        "statistics of recognition": float(recognition.sum()),
        "distances of a test set to all objects": 4.0 * test * objects * len(modalities) * channels,
        "every metric of every object after every step": 8.0 * numbers * objects**2,
        "calibration scores, as text in a snapshot": float(objects * len(calibration)),
    }
    return sizes | {
        "weights and optimiser, on every device": sizes[f"weights of {config.method}"] + size(optimizer),
        "all snapshots, of the weights": objects * (size(initial) - size(heads)) + room * size(heads) / capacity(0),
        "all snapshots, of memory_bank": objects * bank,
        "ledger": len(variants) * pairs * (len(json.dumps(event)) + 1) + pairs * len(decision),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
