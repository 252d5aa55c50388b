"""Measure how fast images are prepared, read and transferred to the device.

    python -m tests.harness.input_pipeline --config=quickstart

The training images of the config's first object are prepared in a temporary folder. Measured are: preparation, stage by
stage in a single-threaded loop and by the store; reading prepared images, compared with ArrayRecord; transfer to the
device, streamed and resident; the time that training waits for images; and memory use during an epoch of 10,000 images,
which repeats the prepared ones.
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
_SECONDS = 3.0  # duration of a repeated measurement
_ROUNDS = 5
_EPOCH = 10_000  # images per epoch of the memory measurement

Row = tuple[str, str, str]  # quantity, value, unit or comparison


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_integer(
        "epochs", 3, "Number of timed training epochs; one more warms up.", lower_bound=1, flag_values=values
    )


def _measure(values: flags.FlagValues) -> str:
    from iumad_jax.data import readers
    from iumad_jax.data.prepared.store import open_store

    config, _ = cli.config_and_workdir(values)
    config.dataset.prepared = ""
    readers.render(config)
    reader = readers.open_reader(config)
    object_ = reader.objects[0]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(config, reader, Path(folder))
        rows, loop_rate = _preparing(store, object_)
        batch = store.get(object_, "train").batch
        start = time.perf_counter()
        open_store(config, reader, Path(folder)).get(object_, "train")
        size = sum(array.nbytes for array in jax.tree.leaves(batch))
        rows.append(("opening, all checksums verified", _rate(size / 1e9, start, 2), "GB/s"))
        rows += _reading(batch, Path(folder))
        rows += _ready(batch, loop_rate)
        rows += _waiting(config, batch, len(reader.objects), values.epochs)
        rows += _memory(batch)
    images = f"{len(batch.object_id)} images of {object_}, {config.modality}, {psutil.cpu_count()} CPU cores"
    return (
        f"{images}\n{tabulate(rows, ['', '', ''], 'simple', disable_numparse=True, colalign=['left', 'right', 'left'])}"
    )


def _rate(count: float, start: float, digits: int = 0) -> str:
    return f"{count / (time.perf_counter() - start):,.{digits}f}"


def _preparing(store: Any, object_: str) -> tuple[list[Row], float]:
    """Return the rows about preparation, and the images per second of a single-threaded loop."""
    from iumad_jax.data import depth
    from iumad_jax.data.prepared.store import ENCODED_AT_ONCE

    seconds = dict.fromkeys(("read", "depth", "processing", "backbone"), 0.0)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        seconds[stage] += time.perf_counter() - start
        return result

    ids = store.reader.ids(object_, "train")
    size = store.processing.size
    np.asarray(store.encoder(np.zeros((ENCODED_AT_ONCE, size, size, 3), np.float32)))  # compiles the encoder
    for first in range(0, len(ids), ENCODED_AT_ONCE):
        samples = [
            timed("read", store.reader.read, object_, "train", id_) for id_ in ids[first : first + ENCODED_AT_ONCE]
        ]
        for sample in samples:
            if sample.depth is not None:  # part of processing, here timed separately
                timed("depth", depth.measure, sample.depth, sample.camera, store.processing.normals_window)
        arrays = [timed("processing", store.processing, sample) for sample in samples]
        for modality in store.processing.modalities:
            images = np.zeros((ENCODED_AT_ONCE, size, size, 3), np.float32)
            images[: len(arrays)] = [array[f"images_{modality}"] for array in arrays]
            timed("backbone", lambda images: np.asarray(store.encoder(images)), images)
    loop = len(ids) / (seconds["read"] + seconds["processing"] + seconds["backbone"])
    start = time.perf_counter()
    store.prepare(object_, "train")
    with_store = len(ids) / (time.perf_counter() - start)
    seconds["processing"] -= seconds["depth"]
    stages = {"read": "decoding", "depth": "plane, height, normals", "processing": "encoding of depth, resizing"}
    rows = [
        (f"loop: {stages.get(stage, stage)}", f"{1e3 * total / len(ids):.1f}", "ms/image")
        for stage, total in seconds.items()
    ]
    rows += [
        ("loop: all", f"{loop:.1f}", "images/s"),
        (
            "store: all, with hashes and writing",
            f"{with_store:.1f}",
            f"images/s, {with_store / loop:.2f} times the loop",
        ),
    ]
    return rows, loop


def _reading(batch: Any, folder: Path) -> Iterator[Row]:
    """Yield the rates of reading features, and of reading features and images, from the store and from ArrayRecord.

    The two take turns; the best round counts.
    """
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
                source = list(rates)[turn % 2]
                order, rows_read = np.random.default_rng(turn).permutation(count), 0
                start = time.perf_counter()
                while time.perf_counter() - start < _SECONDS / _ROUNDS:
                    for row in order:
                        _parse(reader.read([int(row)])[0], leaves) if source else [np.array(a[row]) for a in leaves]
                    rows_read += count
                rates[source].append(rows_read / (time.perf_counter() - start))
        for source, rounds in rates.items():
            yield f"reading {name}{source}", f"{max(rounds):,.0f}", "images/s"


def _parse(record: bytes, templates: list[np.ndarray]) -> list[np.ndarray]:
    """Parse the arrays of one image, which have the dtypes and the row shapes of the templates."""
    arrays, offset = [], 0
    for template in templates:
        array = np.frombuffer(record, template.dtype, template[0].size, offset)
        arrays.append(array.reshape(template.shape[1:]))
        offset += template[0].nbytes
    return arrays


def _on_device(stream: Generator[Any, None, None], updates: int) -> Generator[None, None, None]:
    """Place the images of every update on the device, as float32; yield when they are there."""
    take = jax.jit(lambda images, rows: jax.tree.map(lambda a: a[0, rows[0, 0]].astype(np.float32), images))
    with closing(stream):
        for images, rows, *_ in islice(stream, updates):
            jax.block_until_ready(take(images, rows))
            yield


def _ready(batch: Any, loop_rate: float) -> Iterator[Row]:
    """Yield the rates of images that are ready on the device, compared with those of the single-threaded loop."""
    from iumad_jax.data import batches

    for name, resident in {"streamed": "never", "resident": "always"}.items():
        start = time.perf_counter()
        updates = _on_device(batches.training_input([batch], _BATCH, 0, 0, resident, 1), 10**6)
        next(updates)
        first_batch, start, count = time.perf_counter() - start, time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS:
            next(updates)
            count += _BATCH
        rate = count / (time.perf_counter() - start)
        yield f"on the device, {name}", f"{rate:,.0f}", f"images/s, {rate / loop_rate:.0f} times the loop"
        yield f"until the first batch, {name}", f"{first_batch:.2f}", "s, with compilation"
        updates.close()


def _waiting(config: Any, batch: Any, objects: int, epochs: int) -> Iterator[Row]:
    """Yield the time per update, and the share of it in which training waits for input."""
    from iumad_jax import methods
    from iumad_jax.data import batches
    from iumad_jax.training.epochs import train_epochs
    from iumad_jax.training.optimization import make_optimizer
    from iumad_jax.training.update import initial_state, make_update

    method = methods.build(config.method, config)
    optimizer = make_optimizer(config.train)
    update = make_update(method, optimizer)
    variables = jax.jit(method.init)(jax.random.key(0), jax.tree.map(lambda array: array[:1], batch))
    variables = method.grow(variables, objects, jax.random.key(0))
    per_epoch = batches.updates_per_epoch(len(batch.object_id), config.train.batch_size)
    for name, resident in {"streamed": "never", "resident": "always"}.items():
        waits: list[float] = []

        def timed(stream: Generator[Any, None, None], waits: list[float] = waits) -> Generator[Any, None, None]:
            with closing(stream):
                while True:
                    start = time.perf_counter()
                    device_batches = next(stream)
                    waits.append(time.perf_counter() - start)
                    yield device_batches

        stream = timed(batches.training_input([batch], config.train.batch_size, 0, 0, resident))
        state = initial_state(variables, optimizer, 0, [])
        passes = train_epochs(update, state, stream, lambda _: 1e-4, jax.random.key(0), per_epoch, 1 + epochs)
        next(passes)
        waits.clear()
        start = time.perf_counter()
        for _ in passes:
            pass
        seconds = time.perf_counter() - start
        yield f"training, {name}: an update", f"{1e3 * seconds / epochs / per_epoch:.0f}", "ms"
        yield f"training, {name}: waiting for input", f"{100 * sum(waits) / seconds:.2f}", "% of the time"


def _memory(batch: Any) -> Iterator[Row]:
    """Yield the memory of the process, mapped files excluded, while it streams a long epoch."""
    from iumad_jax.data import batches

    sets = [batch] * (1 + _EPOCH // len(batch.object_id))
    updates = _EPOCH // _BATCH
    megabytes = []
    for _ in _on_device(batches.training_input(sets, _BATCH, 0, 0, "never"), updates):
        memory = psutil.Process().memory_info()
        megabytes.append((memory.rss - memory.shared) / 1e6)
    tenths = [max(part) for part in np.array_split(megabytes, 10)]
    yield (
        "memory, first to last tenth of an epoch",
        " ".join(f"{tenth:.0f}" for tenth in tenths),
        "MB, without mapped files",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
