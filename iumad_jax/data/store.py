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

from iumad_jax.data import depth, transforms
from iumad_jax.data.sample import Reader, Sample, Split
from iumad_jax.errors import UserError
from iumad_jax.models import efficientnet
from iumad_jax.shapes import MAP_SIZE, Batch, GroundTruth, Modality

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
    encoder: Encoder
    modalities: tuple[Modality, ...]
    size: int
    depth_encoding: str
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
            {m: arrays[f"features_{m}"] for m in self.modalities},
            {m: arrays[f"images_{m}"] for m in self.modalities},
            object_id,
        )
        truth = None if split == "train" else GroundTruth(**{name: arrays[name] for name in GroundTruth._fields})
        return PreparedSet(batch, truth, tuple(json.loads((folder / "defects.json").read_text())), ids)

    def _fingerprint(self, object_: str, split: Split, ids: tuple[str, ...]) -> str:
        sources = [file for id_ in ids for file in self.reader.files(object_, split, id_)]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
        modules = (depth, transforms, efficientnet, inspect.getmodule(self.reader), inspect.getmodule(self))
        code = [inspect.getsource(module) for module in modules if module]
        settings = [self.settings, self.modalities, self.size, self.depth_encoding, str(self.reader)]
        return hashlib.sha256(json.dumps([code, settings, stamps]).encode()).hexdigest()[:16]

    def _prepare(self, folder: Path, object_: str, split: Split, ids: tuple[str, ...]) -> None:
        files: dict[str, BinaryIO] = {}
        defects: list[str] = []
        bar = tqdm(total=len(ids), desc=f"preparing {object_} {split}", unit="image", disable=None, leave=False)
        with ThreadPoolExecutor() as pool, ExitStack() as opened, bar:
            for start in range(0, len(ids), _CHUNK):
                samples = list(pool.map(lambda id_: self.reader.read(object_, split, id_), ids[start : start + _CHUNK]))
                chunk = list(pool.map(self._process, samples))
                values = {name: np.stack([one[name] for one in chunk]) for name in chunk[0]}
                values |= {f"features_{m}": self._encode(values[f"images_{m}"]) for m in self.modalities}
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

    def _process(self, sample: Sample) -> dict[str, np.ndarray]:
        """One sample at the sizes of the network's input and of the map."""
        assert sample.depth is not None
        assert sample.camera is not None
        arrays = {
            "mask": transforms.resize_mask(sample.mask, MAP_SIZE),
            "anomalous": np.array(sample.anomalous),
            "thumbnail": transforms.resize_image(sample.rgb, MAP_SIZE),
            "depth": transforms.resize_nearest(sample.depth, MAP_SIZE),
        }
        try:
            surface = depth.measure(sample.depth, sample.camera)
        except UserError as error:
            raise UserError(f"{sample.object} {sample.id} in {self.reader}: {error}") from error
        above = depth.object_mask(surface.height, self.reader.object_height)
        arrays["object"] = transforms.region(above, MAP_SIZE)
        arrays["workpiece"] = transforms.region(depth.free_standing(above), MAP_SIZE)
        if "rgb" in self.modalities:
            arrays["images_rgb"] = transforms.resize_image(sample.rgb, self.size)
        if "depth" in self.modalities:
            encoded = depth.encode(surface, self.depth_encoding, self.reader.height_range)
            arrays["images_depth"] = transforms.resize_image(encoded, self.size).astype(np.float16)
        return arrays

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
