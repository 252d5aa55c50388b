"""Prepared images: read, processed and encoded by the frozen backbone once, kept as memory-mapped arrays."""

import dataclasses
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from iumad_jax.data import depth, processing, transforms
from iumad_jax.data.processing import Processing
from iumad_jax.data.sample import Reader, Split
from iumad_jax.errors import UserError
from iumad_jax.models import efficientnet
from iumad_jax.shapes import Batch, GroundTruth

Encoder = Callable[[Any], jax.Array]  # images (b h w 3), 0..255 -> features (b g g f)
_CHUNK = 8  # images encoded at once


class PreparedSet(NamedTuple):
    """All images of one object and split."""

    batch: Batch
    truth: GroundTruth | None  # None for training images
    defects: tuple[str, ...]
    ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Store:
    """Prepares sets on first use and finds them again while settings, source files and code are the same."""

    folder: Path
    reader: Reader
    processing: Processing
    encoder: Encoder
    settings: dict[str, Any]  # what else the features depend on

    def get(self, object_: str, split: Split) -> PreparedSet:
        """The prepared images of one object and split.

        Raises:
            UserError: a source file is missing or unusable, or the prepared images cannot be written.
        """
        ids = self.reader.ids(object_, split)
        folder = self.folder / f"{object_}-{split}-{self._fingerprint(object_, split, ids)}"
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".unfinished")
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                self._prepare(unfinished, object_, split, ids)
                unfinished.rename(folder)
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be prepared ({error.strerror}); make room or choose another"
                    " --config.dataset.prepared."
                ) from error
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        object_id: Any = np.full(len(ids), self.reader.objects.index(object_), np.int32)
        batch = Batch(
            {m: arrays[f"features_{m}"] for m in self.processing.modalities},
            {m: arrays[f"images_{m}"] for m in self.processing.modalities},
            object_id,
        )
        truth = None if split == "train" else GroundTruth(**{name: arrays[name] for name in GroundTruth._fields})
        return PreparedSet(batch, truth, tuple(json.loads((folder / "defects.json").read_text())), ids)

    def _fingerprint(self, object_: str, split: Split, ids: tuple[str, ...]) -> str:
        sources = [file for id_ in ids for file in self.reader.files(object_, split, id_)]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
        modules = (depth, processing, transforms, efficientnet, inspect.getmodule(self.reader), inspect.getmodule(self))
        code = [inspect.getsource(module) for module in modules if module]
        settings = [self.settings, dataclasses.astuple(self.processing), str(self.reader)]
        return hashlib.sha256(json.dumps([code, settings, stamps]).encode()).hexdigest()[:16]

    def _prepare(self, folder: Path, object_: str, split: Split, ids: tuple[str, ...]) -> None:
        files: dict[str, BinaryIO] = {}
        defects: list[str] = []
        bar = tqdm(total=len(ids), desc=f"preparing {object_} {split}", unit="image", disable=None, leave=False)
        with ThreadPoolExecutor() as pool, ExitStack() as opened, bar:
            for start in range(0, len(ids), _CHUNK):
                samples = list(pool.map(lambda id_: self.reader.read(object_, split, id_), ids[start : start + _CHUNK]))
                chunk = list(pool.map(self.processing, samples))
                values = {name: np.stack([one[name] for one in chunk]) for name in chunk[0]}
                values |= {f"features_{m}": self._encode(values[f"images_{m}"]) for m in self.processing.modalities}
                for name, value in values.items():
                    if name in GroundTruth._fields and split == "train":
                        continue
                    if name not in files:
                        files[name] = opened.enter_context((folder / f"{name}.npy").open("wb"))
                        _write_header(files[name], value.dtype, (len(ids), *value.shape[1:]))
                    files[name].write(value.tobytes())
                defects += [sample.defect for sample in samples]
                bar.update(len(samples))
        (folder / "defects.json").write_text(json.dumps(defects))

    def _encode(self, images: np.ndarray) -> np.ndarray:
        """Tokens of a chunk, which is filled up so that the backbone is compiled once."""
        full = np.zeros((_CHUNK, *images.shape[1:]), np.float32)
        full[: len(images)] = images
        features = np.asarray(self.encoder(full))[: len(images)]
        return features.reshape(len(images), -1, features.shape[-1])


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The start of a .npy file whose rows follow: writing to a memory-mapped one would kill us on a full disk."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
