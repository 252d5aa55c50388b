"""How fast images are prepared, read and brought to a model: python -m tests.harness.input_pipeline --config=FILE.

With the training images of the config's first object, prepared anew in a temporary folder, in one run: preparing, stage
by stage in a single-threaded loop, and by the store; reading prepared images, and the same from ArrayRecord; images
ready on the device, prepared and not; how long training waits for them; and memory over an epoch of 10,000 images, made
by repetition.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from absl import flags
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tabulate import tabulate

from iumad_jax import cli

_BATCH = 8
_SECONDS = 3.0  # of a measurement that can be repeated
_ROUNDS = 5
_EPOCH = 10_000  # images

Row = tuple[str, str, str]  # what, how much, of what unit or against what


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_integer("epochs", 3, "Of training, after a first one.", lower_bound=1, flag_values=values)


def _measure(values: flags.FlagValues) -> str:
    from iumad_jax.data import readers
    from iumad_jax.data.prepared.store import open_store

    config, _ = cli.given_config(values)
    config.dataset.prepared = ""
    readers.render(config)
    reader = readers.open_reader(config)
    object_ = reader.objects[0]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(config, reader, Path(folder))
        rows, per_second = _preparing(store, object_)
        batch = store.get(object_, "train").batch
        began = time.perf_counter()
        open_store(config, reader, Path(folder)).get(object_, "train")
        size = sum(array.nbytes for array in jax.tree.leaves(batch))
        rows.append(("opening with all checksums", _rate(size / 1e9, began, 2), "GB/s"))
        rows += _reading(batch, Path(folder))
        rows += _ready(batch, per_second)
        rows += _waiting(config, batch, len(reader.objects), values.epochs)
        rows += _memory(batch)
    images = f"{len(batch.object_id)} images of {object_}, {config.modality}, {psutil.cpu_count()} CPU cores"
    return (
        f"{images}\n{tabulate(rows, ['', '', ''], 'simple', disable_numparse=True, colalign=['left', 'right', 'left'])}"
    )


def _rate(count: float, began: float, digits: int = 0) -> str:
    return f"{count / (time.perf_counter() - began):,.{digits}f}"


def _preparing(store: Any, object_: str) -> tuple[list[Row], float]:
    """Also how many images a single-threaded loop makes ready per second."""
    from iumad_jax.data import depth
    from iumad_jax.data.prepared.store import ENCODED_AT_ONCE

    seconds = dict.fromkeys(("read", "depth", "processing", "backbone"), 0.0)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        seconds[stage] += time.perf_counter() - began
        return result

    ids = store.reader.ids(object_, "train")
    size = store.processing.size
    np.asarray(store.encoder(np.zeros((ENCODED_AT_ONCE, size, size, 3), np.float32)))  # compiles
    for start in range(0, len(ids), ENCODED_AT_ONCE):
        samples = [
            timed("read", store.reader.read, object_, "train", id_) for id_ in ids[start : start + ENCODED_AT_ONCE]
        ]
        for sample in samples:
            if sample.depth is not None:  # a part of processing, timed once more by itself
                timed("depth", depth.measure, sample.depth, sample.camera, store.processing.normals_window)
        arrays = [timed("processing", store.processing, sample) for sample in samples]
        for modality in store.processing.modalities:
            images = np.zeros((ENCODED_AT_ONCE, size, size, 3), np.float32)
            images[: len(arrays)] = [one[f"images_{modality}"] for one in arrays]
            timed("backbone", lambda images: np.asarray(store.encoder(images)), images)
    loop = len(ids) / (seconds["read"] + seconds["processing"] + seconds["backbone"])
    began = time.perf_counter()
    store.prepare(object_, "train")
    whole = len(ids) / (time.perf_counter() - began)
    seconds["processing"] -= seconds["depth"]
    stages = {"read": "decoding", "depth": "plane, height, normals", "processing": "encoding of depth, resizing"}
    rows = [
        (f"loop: {stages.get(stage, stage)}", f"{1e3 * taken / len(ids):.1f}", "ms/image")
        for stage, taken in seconds.items()
    ]
    rows += [
        ("loop: all", f"{loop:.1f}", "images/s"),
        ("store: all, with hashes and writing", f"{whole:.1f}", f"images/s, {whole / loop:.2f} times the loop"),
    ]
    return rows, loop


def _reading(batch: Any, folder: Path) -> Iterator[Row]:
    """Features alone, and all that training reads: the best of some rounds in turn."""
    count = len(batch.object_id)
    for name, arrays in {"features": batch.features, "features and images": (batch.features, batch.images)}.items():
        leaves = jax.tree.leaves(arrays)
        file = str(folder / "comparison")
        writer = ArrayRecordWriter(file, "group_size:1,uncompressed")
        for row in range(count):
            writer.write(b"".join(array[row].tobytes() for array in leaves))
        writer.close()
        with closing(ArrayRecordReader(file)) as reader:
            rates: dict[str, list[float]] = {"": [], " from ArrayRecord": []}
            for turn in range(2 * _ROUNDS):
                which = list(rates)[turn % 2]
                order, done, began = np.random.default_rng(turn).permutation(count), 0, time.perf_counter()
                while time.perf_counter() - began < _SECONDS / _ROUNDS:
                    for row in order:
                        _parse(reader.read([int(row)])[0], leaves) if which else [np.array(a[row]) for a in leaves]
                    done += count
                rates[which].append(done / (time.perf_counter() - began))
        for which, every in rates.items():
            yield f"reading {name}{which}", f"{max(every):,.0f}", "images/s"


def _parse(record: bytes, like: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays of one image from its record."""
    parsed, at = [], 0
    for array in like:
        parsed.append(np.frombuffer(record, array.dtype, array[0].size, at).reshape(array.shape[1:]))
        at += array[0].nbytes
    return parsed


def _on_device(stream: Generator[Any, None, None], updates: int) -> Generator[None, None, None]:
    """Every device_batches's images as float32 on the device; of resident ones, those of one update."""
    take = jax.jit(lambda images, rows: jax.tree.map(lambda a: a[0, rows[0, 0]].astype(np.float32), images))
    with closing(stream):
        for images, rows, *_ in islice(stream, updates):
            jax.block_until_ready(take(images, rows))
            yield


def _ready(batch: Any, per_second: float) -> Iterator[Row]:
    from iumad_jax.data import batches

    for name, resident in {"streamed": "never", "resident": "always"}.items():
        began = time.perf_counter()
        steps = _on_device(batches.training_input([batch], _BATCH, 0, 0, resident, 1), 10**6)
        next(steps)
        placed, began, done = time.perf_counter() - began, time.perf_counter(), 0
        while time.perf_counter() - began < _SECONDS:
            next(steps)
            done += _BATCH
        rate = done / (time.perf_counter() - began)
        yield f"on the device, {name}", f"{rate:,.0f}", f"images/s, {rate / per_second:.0f} times the loop"
        yield f"until the first batch, {name}", f"{placed:.2f}", "s, with compilation"
        steps.close()


def _waiting(config: Any, batch: Any, objects: int, epochs: int) -> Iterator[Row]:
    """The share of training in which it waits for its input."""
    from iumad_jax import methods
    from iumad_jax.data import batches
    from iumad_jax.training.epochs import train_epochs
    from iumad_jax.training.optimization import make_optimizer
    from iumad_jax.training.update import initial_state, make_update

    method = methods.build(config.method, config, objects)
    optimizer = make_optimizer(config.train)
    update = make_update(method, optimizer)
    variables = jax.jit(method.init)(jax.random.key(0), jax.tree.map(lambda array: array[:1], batch))
    per_epoch = batches.updates_per_epoch(len(batch.object_id), config.train.batch_size)
    for name, resident in {"streamed": "never", "resident": "always"}.items():
        waits: list[float] = []

        def watched(stream: Generator[Any, None, None], waits: list[float] = waits) -> Generator[Any, None, None]:
            with closing(stream):
                while True:
                    began = time.perf_counter()
                    device_batches = next(stream)
                    waits.append(time.perf_counter() - began)
                    yield device_batches

        stream = watched(batches.training_input([batch], config.train.batch_size, 0, 0, resident))
        state = initial_state(variables, optimizer, 0, [])
        passes = train_epochs(update, state, stream, lambda _: 1e-4, jax.random.key(0), per_epoch, 1 + epochs)
        next(passes)
        waits.clear()
        began = time.perf_counter()
        for _ in passes:
            pass
        taken = time.perf_counter() - began
        yield f"training, {name}: an update", f"{1e3 * taken / epochs / per_epoch:.0f}", "ms"
        yield f"training, {name}: waiting for input", f"{100 * sum(waits) / taken:.2f}", "% of the time"


def _memory(batch: Any) -> Iterator[Row]:
    """What the process holds beside mapped files, while it streams an epoch of many images."""
    from iumad_jax.data import batches

    sets = [batch] * (1 + _EPOCH // len(batch.object_id))
    updates = _EPOCH // _BATCH
    held = []
    for _ in _on_device(batches.training_input(sets, _BATCH, 0, 0, "never"), updates):
        memory = psutil.Process().memory_info()
        held.append((memory.rss - memory.shared) / 1e6)
    tenths = [max(part) for part in np.array_split(held, 10)]
    yield "memory, first to last tenth of an epoch", " ".join(f"{tenth:.0f}" for tenth in tenths), "MB, not of files"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
