"""Prepared images: read, processed and encoded by the frozen backbone once, stored as memory-mapped arrays.

Each object and split has a folder named `<object>-<split>-<hash>`, where the hash is that of FORMAT and the settings:

    lock             held by the process that changes the folder
    manifest.json    SHA-256 of the source files, and a description of every image
    rows-<hash>/     one .npy file per array, one row per image

Random access to memory-mapped files is several times faster than to records that have to be parsed
(`python -m tests.harness.input_pipeline` measures it).
"""

import dataclasses
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float16, Float64
from ml_collections import ConfigDict
from tqdm import tqdm

from iumad_jax import config as configs
from iumad_jax.data.depth import measured
from iumad_jax.data.prepared import copies, records
from iumad_jax.data.prepared.copies import PreparedSplit
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.records import Image, Manifest, Values
from iumad_jax.data.readers.joined import reader_of
from iumad_jax.data.region import Box, cut
from iumad_jax.data.sample import Reader, Sample, Split
from iumad_jax.data.transforms import foreground
from iumad_jax.errors import UserError
from iumad_jax.models import pretrained
from iumad_jax.models.backbone import FeatureExtractor
from iumad_jax.runtime import preemption
from iumad_jax.runtime.storage import locked
from iumad_jax.shapes import Batch, GroundTruth, Modality, Variables

Encoder = Callable[[Any], jax.Array]  # images (b h w 3), 0..255 -> features (b g g f)
FORMAT = 1  # version of prepared sets; tests/data/test_golden.py fails when their content has changed
ENCODED_AT_ONCE = 2  # images per call of the encoder; larger batches overflow CPU caches and double the time per image
_LOOKAHEAD = 16  # largest number of images processed ahead of encoding


class PreparedSet(NamedTuple):
    """All images of one object and split. Of several tiles of an image, the batch has one row each."""

    batch: Batch  # features in float16; images in the data type in which they were prepared
    truth: GroundTruth | None  # None for training images; without labels, only the fields for figures are meaningful
    defects: tuple[str, ...]
    ids: tuple[str, ...]

    @property
    def tile_ids(self) -> tuple[str, ...]:
        """Names of the batch's rows: the ids, with the number of the tile if an image has several."""
        tiles = len(self.batch.object_id) // len(self.ids)
        return tuple(f"{id_} tile {tile + 1}" for id_ in self.ids for tile in range(tiles)) if tiles > 1 else self.ids


@dataclasses.dataclass(frozen=True)
class Store:
    """Prepared sets, computed on first use and reused while the settings and the content of source files are unchanged.

    Only changed or added images are prepared again. Changed settings, or another FORMAT, lead to another set beside
    the old one. An interrupted preparation is resumed. Several processes may share a folder. Every store verifies the
    checksums of a set once, and prepares damaged images again.

    Attributes:
        folder: Parent folder of the prepared sets.
        reader: Reader of the dataset.
        processing: Conversion of samples to arrays.
        encoder: Frozen backbone.
        settings: Further settings that the features depend on.
        keeps_foreground: Whether training images come with `Batch.foreground`.
    """

    folder: Path
    reader: Reader
    processing: Processing
    encoder: Encoder
    settings: dict[str, Any]
    keeps_foreground: bool = False
    _checked: set[Path] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def get(self, object_: str, split: PreparedSplit) -> PreparedSet:
        """Return the prepared images of an object and split; images not yet prepared are prepared first.

        Raises:
            UserError: If there are no images, a source file is missing or unusable, or the set cannot be written.
        """
        manifest = self.prepare(object_, split)
        images = manifest["images"]
        arrays: dict[str, Any] = records.load(
            self._folder_of(object_, split) / manifest["rows"], self._array_names(split), len(images)
        )
        number = self.reader.objects.index(object_)
        object_id = np.full(len(images) * self.processing.tiling.count, number, np.int32)
        defects, ids = (tuple(image[key] for image in images) for key in ("defect", "id"))
        return self._prepared_set(arrays, object_id, split, defects, ids)

    def prepare(self, object_: str, split: PreparedSplit) -> Manifest:
        """Prepare the images of an object and split that are not prepared yet.

        Returns:
            The manifest of the complete set.

        Raises:
            UserError: As in `get`.
        """
        home = self._folder_of(object_, split)
        manifest = records.read_manifest(home)
        images = self._hash_sources(object_, split, manifest)
        if manifest is not None and self._is_current(home, manifest, images, split):
            _update_stamps(home, manifest, images)
            return manifest
        try:
            home.mkdir(parents=True, exist_ok=True)
            with locked(home / "lock", f"{home}: waiting for another process that prepares the same images."):
                manifest = records.read_manifest(home)  # another process may have written one meanwhile
                if manifest is None and (home / records.MANIFEST).exists():
                    print(f"{home}: the manifest is damaged; its images will be prepared again.", file=sys.stderr)
                if manifest is None or not self._is_current(home, manifest, images, split):
                    manifest = self._prepare_missing(home, object_, split, images, manifest)
        except OSError as error:
            raise UserError(
                f"{home} cannot be prepared ({error.strerror}); make room or choose another --config.dataset.prepared"
                " (images prepared so far are kept)."
            ) from error
        return manifest

    def mean_tokens(self, object_: str) -> dict[Modality, Float64[np.ndarray, "n f"]]:
        """Return the mean tokens of an object's degraded training images by modality; see `copies`.

        Raises:
            UserError: As in `get`.
        """
        manifest = self.prepare(object_, "degraded")
        folder = self._folder_of(object_, "degraded") / manifest["rows"]
        arrays = records.load(folder, self._array_names("degraded"), len(manifest["images"]))
        return {m: _by_row(np.asarray(arrays[f"mean_{m}"]), 1) for m in self.processing.modalities}

    def sources(self, objects: Sequence[str]) -> list[str]:
        """Return one hash per training image of the objects, over its id and its source files' paths and content."""
        return [records.content_key(image) for name in objects for image in self.prepare(name, "train")["images"]]

    def digests(self, object_: str, split: PreparedSplit) -> dict[str, str]:
        """Return a digest of each image's source files by id; empty if the dataset has no such split.

        Raises:
            UserError: If a file cannot be read.
        """
        if not copies.ids(self.reader, object_, split):
            return {}
        images = self._hash_sources(object_, split, records.read_manifest(self._folder_of(object_, split)))
        return {
            image["id"]: records.digest([source["sha256"] for source in image["sources"].values()]) for image in images
        }

    def describe(self) -> dict[str, Any]:
        """Return the settings with which a detector reads and prepares images, as JSON."""
        first = self.reader.objects[0]
        sample = self.reader.read(first, "train", self.reader.ids(first, "train")[0])
        camera = sample.camera and dataclasses.asdict(sample.camera)
        return {
            "processing": dataclasses.asdict(self.processing),
            "depth": dataclasses.asdict(self.reader.depth_format),
            "camera": camera,
            "camera_width": sample.depth if sample.depth is None else sample.depth.shape[1],
            "weights": self.settings.get("weights"),
        }

    def encode(self, samples: Iterable[Sample]) -> PreparedSet:
        """Prepare samples, at least one, in memory instead of on disk."""
        rows: list[Values] = []
        descriptions: list[tuple[str, str, int]] = []
        remaining = iter(samples)
        while chunk := list(islice(remaining, ENCODED_AT_ONCE)):
            values = [self.processing(sample) for sample in chunk]
            self._add_features(values)
            rows += values
            descriptions += [(sample.defect, sample.id, self.reader.objects.index(sample.object)) for sample in chunk]
        arrays = {name: np.stack([row[name] for row in rows]) for name in self._array_names("test")}
        defects, ids, object_ids = zip(*descriptions, strict=True)
        object_id = np.repeat(np.array(object_ids, np.int32), self.processing.tiling.count)
        return self._prepared_set(arrays, object_id, "test", defects, ids)

    def _prepared_set(
        self, arrays: Any, object_id: Any, split: PreparedSplit, defects: tuple[str, ...], ids: tuple[str, ...]
    ) -> PreparedSet:
        features, images = (
            {m: _by_row(arrays[f"{kind}_{m}"], axes) for m in self.processing.modalities}
            for kind, axes in (("features", 2), ("images", 3))
        )
        truth = GroundTruth(**{name: arrays[name] for name in GroundTruth._fields}) if _has_truth(split) else None
        allowed = _by_row(arrays["foreground"], 2) if "foreground" in arrays else None
        return PreparedSet(Batch(features, images, object_id, foreground=allowed), truth, defects, ids)

    def _folder_of(self, object_: str, split: PreparedSplit) -> Path:
        content = [FORMAT, self._settings(object_, split)]
        return self.folder / f"{object_}-{split}-{records.digest(content)[:16]}"

    def _settings(self, object_: str, split: PreparedSplit) -> Any:
        source: Split = "train" if split == "degraded" or split == "varied" else split
        settings = [self.settings, dataclasses.asdict(self.processing), str(reader_of(self.reader, object_, source))]
        return [*settings, *self._foreground(split)]

    def _foreground(self, split: PreparedSplit) -> tuple[str, ...]:
        """Return the name of the array of the foreground, if the images of a split have it."""
        return ("foreground",) if self.keeps_foreground and split == "train" else ()

    def _array_names(self, split: PreparedSplit) -> tuple[str, ...]:
        """Return the names of the stored arrays; training images have no ground truth."""
        if split == "degraded":
            return tuple(f"mean_{m}" for m in self.processing.modalities)
        inputs = [f"{kind}_{m}" for kind in ("features", "images") for m in self.processing.modalities]
        return (*inputs, *(GroundTruth._fields if _has_truth(split) else ()), *self._foreground(split))

    def _hash_sources(self, object_: str, split: PreparedSplit, manifest: Manifest | None) -> list[Image]:
        """List the images that the set should hold, with the hashes of their source files."""
        files = {id_: copies.files(self.reader, object_, split, id_) for id_ in copies.ids(self.reader, object_, split)}
        if not files:
            raise UserError(
                f"{object_} has no {split} images; add some, or name the other objects in config.dataset.objects."
            )
        previous = {
            file: source
            for image in (manifest or {"images": []})["images"]
            for file, source in image["sources"].items()
        }
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda file: records.hash_file(file, previous.get(str(file))), sum(files.values(), ()))
            return [{"id": id_, "sources": {str(file): next(hashes) for file in paths}} for id_, paths in files.items()]

    def _is_current(self, home: Path, manifest: Manifest, images: list[Image], split: PreparedSplit) -> bool:
        """Return whether a set holds exactly these images, undamaged."""
        keys = [records.content_key(image) for image in images]
        if [records.content_key(image) for image in manifest["images"]] != keys:
            return False
        folder = home / manifest["rows"]
        if folder not in self._checked:
            arrays = records.load(folder, self._array_names(split), len(images))
            for index, image in enumerate(manifest["images"]):
                values = records.row(arrays, index)
                if values is None or records.checksum(values) != image["crc32"]:
                    return False
            self._checked.add(folder)
        return True

    def _prepare_missing(
        self, home: Path, object_: str, split: PreparedSplit, images: list[Image], manifest: Manifest | None
    ) -> Manifest:
        """Prepare the images that no folder of the set holds undamaged, and write the manifest of the complete set."""
        target = home / f"rows-{records.digest([records.content_key(image) for image in images])[:16]}"
        with records.Writer(target, len(images)) as writer:
            finished = self._reuse_rows(home, target, split, images, manifest, writer)
            missing = [index for index in range(len(images)) if index not in finished]
            bar = tqdm(total=len(images), initial=len(finished), unit="image", disable=None, leave=False)
            bar.set_description(f"preparing {object_} {split}")
            with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
                processed = self._process_all(pool, object_, split, [(index, images[index]) for index in missing])
                while chunk := list(islice(processed, ENCODED_AT_ONCE)):
                    preemption.check()
                    self._add_features([values for _, _, values in chunk])
                    written = {}
                    for index, image, values in chunk:
                        means = {f"mean_{m}": mean_tokens(values[f"features_{m}"]) for m in self.processing.modalities}
                        masks = {"foreground": self.processing.tiling.cut(foreground(values["workpiece"]))}
                        stored = {name: (values | means | masks)[name] for name in self._array_names(split)}
                        writer.write(index, stored)
                        written[index] = Image(**image, crc32=records.checksum(stored))
                    writer.record(written)
                    finished |= written
                    bar.update(len(chunk))
            manifest = Manifest(
                format=FORMAT,
                settings=self._settings(object_, split),
                rows=target.name,
                images=[finished[index] for index in range(len(images))],
            )
            records.write_manifest(home, manifest)
            writer.remove_journal()
        for other in home.glob("rows-*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        self._checked.add(target)
        return manifest

    def _reuse_rows(
        self,
        home: Path,
        target: Path,
        split: PreparedSplit,
        images: list[Image],
        manifest: Manifest | None,
        writer: records.Writer,
    ) -> dict[int, Image]:
        """Copy the undamaged rows of earlier preparations into the target; return the images of its finished rows."""
        available: dict[str, tuple[Image, Path, Values | None]] = {}
        # The target comes last, because its own rows need no copying and take precedence.
        for folder in sorted(home.glob("rows-*"), key=lambda folder: folder == target):
            if manifest is not None and folder.name == manifest["rows"]:
                recorded, count = dict(enumerate(manifest["images"])), len(manifest["images"])
            else:
                recorded, count = records.read_journal(folder)
            arrays = records.load(folder, self._array_names(split), count)
            available |= {
                records.content_key(image): (image, folder, records.row(arrays, index))
                for index, image in recorded.items()
            }
        finished, damaged = {}, 0
        for index, image in enumerate(images):
            old, folder, values = available.get(records.content_key(image), (None, target, None))
            if old is None:
                continue
            if values is None or records.checksum(values) != old["crc32"]:
                damaged += 1
                continue
            finished[index] = Image(**(old | image))
            if folder != target:
                writer.write(index, values)
                writer.record({index: finished[index]})
        if damaged:
            print(f"{home}: {damaged} of {len(images)} images are damaged and will be prepared again.", file=sys.stderr)
        return finished

    def _process_all(
        self, pool: ThreadPoolExecutor, object_: str, split: PreparedSplit, images: list[tuple[int, Image]]
    ) -> Iterator[tuple[int, Image, Values]]:
        """Yield processed images in order; a bounded number is processed in advance."""
        waiting: deque[tuple[int, Future[tuple[Image, Values]]]] = deque()
        for index, image in images:
            waiting.append((index, pool.submit(self._process, object_, split, image)))
            if len(waiting) > _LOOKAHEAD:
                first, future = waiting.popleft()
                yield first, *future.result()
        for first, future in waiting:
            yield first, *future.result()

    def _process(self, object_: str, split: PreparedSplit, image: Image) -> tuple[Image, Values]:
        """Read and process an image, and complete its description."""
        sample = copies.read(self.reader, object_, split, image["id"], self.processing.extent)
        values = self.processing(sample)
        return Image(**(image | _describe(sample, Box(*values["box"])))), values

    def _add_features(self, chunk: list[Values]) -> None:
        """Add the features of a few images."""
        for modality in self.processing.modalities:
            images = np.stack([values[f"images_{modality}"] for values in chunk])
            features = self.encode_images({modality: _by_row(images, 3)})[modality]
            for values, tokens in zip(chunk, features.reshape(*images.shape[:-3], *features.shape[1:]), strict=True):
                values[f"features_{modality}"] = tokens

    def encode_images(
        self, images: dict[Modality, Float[np.ndarray, "n h w 3"]]
    ) -> dict[Modality, Float16[np.ndarray, "n p f"]]:
        """Compute the features of prepared images, in batches of constant size so that the backbone compiles once.

        Raises:
            UserError: If the features cannot be stored in float16.
        """
        return {modality: np.concatenate(list(self._encode_batches(array))) for modality, array in images.items()}

    def _encode_batches(self, images: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(images), ENCODED_AT_ONCE):
            batch = images[start : start + ENCODED_AT_ONCE]
            padded = np.zeros((ENCODED_AT_ONCE, *batch.shape[1:]), np.float32)
            padded[: len(batch)] = batch
            features = np.asarray(self.encoder(padded))[: len(batch)]
            if not np.abs(features).max() <= np.finfo(np.float16).max:  # true for NaN, too
                raise UserError(
                    "the backbone's features are NaN or exceed the range of float16; set config.backbone.weights to"
                    " pretrained weights."
                )
            yield features.reshape(len(batch), -1, features.shape[-1]).astype(np.float16)


def _by_row(array: Any, axes: int) -> Any:
    """Return an array of images, each of whose tiles becomes a row; rows have this number of axes."""
    return array.reshape(-1, *array.shape[array.ndim - axes :])


def _has_truth(split: PreparedSplit) -> bool:
    return split not in ("train", "varied")


def _describe(sample: Sample, box: Box) -> Image:
    seen = cut(sample, box)
    valid = None if seen.depth is None or seen.camera is None else measured(seen.depth, seen.camera)
    return Image(
        defect=sample.defect,
        size=list(sample.rgb.shape[:2]),
        seen=list(seen.rgb.shape[:2]),
        invalid_depth=None if valid is None else float(1 - valid.mean()),
        mask_area=None if seen.mask is None else float(seen.mask.mean()),
    )


def _update_stamps(home: Path, manifest: Manifest, images: list[Image]) -> None:
    """Store the new times of unchanged files, so that they are not hashed again; skip a locked or read-only set."""
    stamped = [Image(**(old | new)) for old, new in zip(manifest["images"], images, strict=True)]
    if stamped != manifest["images"]:
        with suppress(OSError, UserError), locked(home / "lock"):
            if records.read_manifest(home) == manifest:
                records.write_manifest(home, Manifest(**(manifest | {"images": stamped})))


def mean_tokens(tokens: Float[jax.Array | np.ndarray, "*b p f"]) -> Float64[np.ndarray, "*b f"]:
    """Average the tokens of each image, in float64."""
    return np.asarray(tokens).mean(-2, dtype=np.float64)


@partial(jax.jit, static_argnums=0)
def _features(extractor: FeatureExtractor, weights: Variables, images: Float[Array, "b h w 3"]) -> jax.Array:
    """Compute the backbone's features; compiled once for all stores of an image size."""
    features: Any = extractor.apply(weights, images)
    return features


def open_store(config: ConfigDict, reader: Reader, workdir: Path, inputs: Mapping[str, Any] | None = None) -> Store:
    """Open the store of images prepared for the config's backbone, with the weights loaded.

    Args:
        config: Config of a run.
        reader: Reader of the images.
        workdir: Workdir of the run.
        inputs: How the run has prepared images so far, see `Store.describe`; None derives it from the reader.

    Raises:
        UserError: If weights cannot be loaded, or the run has used others.
    """
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid, config.backbone.levels)
    weights = pretrained.load(config.backbone.name, config.backbone.weights)
    sha256 = pretrained.sha256(weights)
    pretrained.check_same(config.backbone, sha256, inputs or {})
    return Store(
        folder=Path(config.dataset.prepared or workdir / "prepared"),
        reader=reader,
        processing=Processing.recorded(inputs) if inputs else Processing.of(config, reader),
        encoder=partial(_features, extractor, jax.device_put(weights)),
        settings={**config.backbone, "weights": sha256},
        keeps_foreground=configs.keeps_foreground(config),
    )
