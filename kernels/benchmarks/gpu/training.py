"""Training and evaluation at the paper's sizes with the code of `iumad_jax.main`, for as many epochs as fit."""

import json
import time
from pathlib import Path
from typing import Any, get_args

from ml_collections import ConfigDict

from iumad_jax import experiment
from iumad_jax.data import candies, readers
from iumad_jax.data.batches import updates_per_epoch
from iumad_jax.data.prepared.store import open_store
from iumad_jax.data.readers.eyecandies import OBJECTS
from iumad_jax.data.sample import Split
from kernels.benchmarks.gpu import update
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

UPDATE_SHARE = 0.4  # share of the time after preparation that updates may take; the rest compiles and evaluates
CANDIES = {"objects": "CandyCane,GummyBear", "train": 48, "val": 4, "test": 16, "size": 256}
SMALL_CANDIES = {"objects": "CandyCane", "train": 5, "val": 1, "test": 2, "size": 64}


def cases(options: Options) -> Cases:
    """Yield a single row, named after the dataset."""
    yield "eyecandies" if options.data else "candies", lambda: train(options, workdir(options))


def workdir(options: Options) -> Path:
    """Return the workdir of the training."""
    return Path(options.scratch) / "training"


def train(options: Options, folder: Path, epochs: int | None = None) -> Row:
    """Prepare the images, train for the given number of epochs or as many as fit, and evaluate."""
    start = time.monotonic()
    config = settings(options)
    reader = readers.open_reader(config)
    store = open_store(config, reader, folder)
    splits: tuple[Split, ...] = get_args(Split)
    for name in reader.objects:
        for split in splits:
            if reader.ids(name, split):
                store.prepare(name, split)
    preparation_end = time.monotonic()
    images = sum(len(reader.ids(name, "train")) for name in reader.objects)
    if epochs is None:
        seconds = updates_per_epoch(images, config.train.batch_size) * seconds_of_update(options)
        remaining = options.seconds - (time.monotonic() - start)
        epochs = max(1, min(config.train.epochs, int(UPDATE_SHARE * remaining / seconds)))
    config.train.epochs = epochs
    training_start = time.monotonic()
    experiment.run(config, folder)
    row: Row = {"method": config.method, "objects": len(reader.objects), "images": images, "epochs": epochs}
    row |= {"prepare_seconds": preparation_end - start, "run_seconds": time.monotonic() - training_start}
    events = map(json.loads, (folder / "live.jsonl").read_text().splitlines())
    rates = [event["images_per_second"] for event in events if event["event"] == "epoch"]
    row |= {"images/s, last epoch": rates[-1] if rates else None}
    return row | {"results": (folder / "results.md").read_text()}


def settings(options: Options) -> ConfigDict:
    """Return the paper's config, with all objects of --data, or of rendered candies, learned in one step."""
    config = update.settings(options)
    candies_options: dict[str, Any] = SMALL_CANDIES if options.rehearse else CANDIES
    root = Path(options.data) if options.data else candies.render(f"{options.scratch}/candies", **candies_options)
    names = [name for name in OBJECTS if (root / name).is_dir()]
    config.dataset.root = str(root)
    if options.rehearse:  # a network that compiles quickly
        config.method, config.backbone.grid, config.baselines, config.train.epochs = "uniad", 8, "", 2
    config.dataset.objects, config.protocol = ",".join(names), f"{len(names)}-0"
    return config


def seconds_of_update(options: Options) -> float:
    """Return the time of an update with TF32, JAX's default, from the results of the part `update` or measured now."""
    file = Path(options.out) / "update.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    measured_seconds = [row["ms"] / 1e3 for key, row in rows.items() if "TF32" in key and "ms" in row]
    return min(measured_seconds) if measured_seconds else update.measure(settings(options), "", "TF32", 0.0)["ms"] / 1e3
