"""Training at the paper's sizes, for as many epochs as fit, by the code of `iumad_jax.main`: with its results."""

import json
import time
from pathlib import Path
from typing import get_args

from ml_collections import ConfigDict

from iumad_jax import data, experiment, inputs
from iumad_jax.data.eyecandies import OBJECTS
from iumad_jax.data.pipeline import updates_per_epoch
from iumad_jax.data.sample import Split
from kernels.benchmarks.gpu import update
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

SHARE = 0.4  # of the time left once images are prepared that updates may take; the rest compiles and evaluates
SMALL_CANDIES = {"train": 5, "val": 1, "test": 2, "size": 64}


def cases(options: Options) -> Cases:
    """One row."""
    yield "eyecandies" if options.data else "candies", lambda: train(options)


def workdir(options: Options) -> Path:
    """Of the run."""
    return Path(options.scratch) / "training"


def train(options: Options, epochs: int | None = None) -> Row:
    """Prepares, trains for so many epochs or as many as fit, and evaluates."""
    began = time.monotonic()
    config = settings(options)
    data.render(config)
    reader = data.open_reader(config)
    store = inputs.open_store(config, reader, workdir(options))
    splits: tuple[Split, ...] = get_args(Split)
    for name in reader.objects:
        for split in splits:
            if reader.ids(name, split):
                store.prepare(name, split)
    prepared = time.monotonic()
    images = sum(len(reader.ids(name, "train")) for name in reader.objects)
    if epochs is None:
        seconds = updates_per_epoch(images, config.train.batch_size) * seconds_of_update(options)
        left = options.seconds - (time.monotonic() - began)
        epochs = max(1, min(config.train.epochs, int(SHARE * left / seconds)))
    config.train.epochs = epochs
    trained = time.monotonic()
    experiment.run(config, workdir(options))
    row: Row = {"objects": len(reader.objects), "images": images, "epochs": epochs, "scan": config.model.scan or "default"}
    row |= {"prepare_seconds": prepared - began, "run_seconds": time.monotonic() - trained}
    events = map(json.loads, (workdir(options) / "live.jsonl").read_text().splitlines())
    rates = [event["images_per_second"] for event in events if event["event"] == "epoch"]
    row |= {"images/s, last epoch": rates[-1] if rates else None}
    return row | {"results": (workdir(options) / "results.md").read_text()}


def settings(options: Options) -> ConfigDict:
    """The paper's, all objects of the dataset being learned in one step."""
    config = update.settings(options)
    if options.data:
        config.dataset.root = options.data
        names = [name for name in OBJECTS if (Path(options.data) / name).is_dir()]
    else:
        config.dataset.name, config.dataset.root = "candies", f"{options.scratch}/candies"
        names = list(OBJECTS[:1] if options.rehearse else OBJECTS)
    if options.rehearse:
        config.dataset.render.update(SMALL_CANDIES)
        config.floors, config.train.epochs, config.model.scan = "", 2, "xla"  # an interpreted kernel takes seconds
    config.dataset.objects, config.protocol = ",".join(names), f"{len(names)}-0"
    return config


def seconds_of_update(options: Options) -> float:
    """As the part `update` found, or else as it is found now: with TF32, which is JAX's default."""
    file = Path(options.out) / "update.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    found = [row["ms"] / 1e3 for key, row in rows.items() if "TF32" in key and "ms" in row]
    return min(found) if found else update.measure(settings(options), "", "TF32", 0.0)["ms"] / 1e3
