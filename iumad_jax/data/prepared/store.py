"""Prepared images: read, processed and encoded by the frozen backbone once, kept as memory-mapped arrays.

Every object and split has a folder of its own, whose name is a hash of FORMAT and the settings:

    lock             held by the one process that changes the folder
    manifest.json    the source files, by SHA-256, and what is known of their images
    rows-<hash>/     one .npy file per array, one row per image

StrategyState-mapped files because they are read at random several times faster than records that have to be parsed
(`python -m tests.harness.input_pipeline`).
"""

import dataclasses
import hashlib
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float64
from ml_collections import ConfigDict
from tqdm import tqdm

from iumad_jax import config as configs
from iumad_jax.data.prepared import copies, records
from iumad_jax.data.prepared.copies import PreparedSplit
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.records import Image, Manifest, Values
from iumad_jax.data.sample import Reader, Sample
from iumad_jax.errors import UserError
from iumad_jax.models import pretrained
from iumad_jax.models.efficientnet import FeatureExtractor
from iumad_jax.runtime import preemption
from iumad_jax.runtime.storage import locked
from iumad_jax.shapes import Batch, GroundTruth, Modality, Variables

Encoder = Callable[[Any], jax.Array]  # images (b h w 3), 0..255 -> features (b g g f)
FORMAT = 1  # of prepared sets; tests/data/test_golden.py tells when what they hold has changed
ENCODED_AT_ONCE = 2  # images: with more, activations leave a CPU's caches, and one takes twice as long
_AHEAD = 16  # images processed while others are encoded


class PreparedSet(NamedTuple):
    """All images of one object and split."""

    batch: Batch  # features in float16; images in the type they are prepared in
    truth: GroundTruth | None  # None for training images; unlabelled ones have what pictures show
    defects: tuple[str, ...]
    ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Store:
    """Prepares sets on first use and finds them again while settings and the content of source files are the same.

    When files or images have changed, only those are prepared anew; when settings have, or FORMAT, another set is made
    and the old one left alone. Of a preparation that is interrupted all that is done stays. Several processes may share
    a folder. What is on disk is checked once by every store that opens it, and damaged images are prepared again.
    """

    folder: Path
    reader: Reader
    processing: Processing
    encoder: Encoder
    settings: dict[str, Any]  # what else the features depend on
    _checked: set[Path] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def get(self, object_: str, split: PreparedSplit) -> PreparedSet:
        """The prepared images of one object and split.

        Raises:
            UserError: there are none, a source file is missing or unusable, or they cannot be written.
        """
        manifest = self.prepare(object_, split)
        images = manifest["images"]
        arrays: dict[str, Any] = records.load(
            self._folder_of(object_, split) / manifest["rows"], self._names(split), len(images)
        )
        object_id = np.full(len(images), self.reader.objects.index(object_), np.int32)
        defects, ids = (tuple(image[key] for image in images) for key in ("defect", "id"))
        return self._set(arrays, object_id, split, defects, ids)

    def prepare(self, object_: str, split: PreparedSplit) -> Manifest:
        """Prepares what is not yet prepared of one object and split.

        Returns:
            What is known of its images.

        Raises:
            UserError: as `get` does.
        """
        home = self._folder_of(object_, split)
        manifest = records.read_manifest(home)
        images = self._sources(object_, split, manifest)
        if manifest is not None and self._is_current(home, manifest, images, split):
            _restamp(home, manifest, images)
            return manifest
        try:
            home.mkdir(parents=True, exist_ok=True)
            with locked(home / "lock", f"{home}: another process prepares this; waiting for it."):
                manifest = records.read_manifest(home)  # another process may have written one meanwhile
                if manifest is None and (home / records.MANIFEST).exists():
                    print(f"{home}: its manifest is damaged; its images are prepared again.", file=sys.stderr)
                if manifest is None or not self._is_current(home, manifest, images, split):
                    manifest = self._complete(home, object_, split, images, manifest)
        except OSError as error:
            raise UserError(
                f"{home} cannot be prepared ({error.strerror}); make room or choose another --config.dataset.prepared."
                " What was prepared so far is kept."
            ) from error
        return manifest

    def mean_tokens(self, object_: str) -> dict[Modality, Float64[np.ndarray, "n f"]]:
        """The mean tokens of an object's degraded training images, by modality; see `copies`.

        Raises:
            UserError: as `get` does.
        """
        manifest = self.prepare(object_, "degraded")
        folder = self._folder_of(object_, "degraded") / manifest["rows"]
        arrays = records.load(folder, self._names("degraded"), len(manifest["images"]))
        return {m: np.asarray(arrays[f"mean_{m}"]) for m in self.processing.modalities}

    def sources(self, objects: Sequence[str]) -> list[str]:
        """What the objects' training images are made from, by name and content of the source files."""
        return [records.key(image) for name in objects for image in self.prepare(name, "train")["images"]]

    def digests(self, object_: str, split: PreparedSplit) -> dict[str, str]:
        """A digest of each image's source files, by id; none where the dataset has no such split.

        Raises:
            UserError: a file cannot be read.
        """
        if not copies.ids(self.reader, object_, split):
            return {}
        images = self._sources(object_, split, records.read_manifest(self._folder_of(object_, split)))
        return {
            image["id"]: records.digest([source["sha256"] for source in image["sources"].values()]) for image in images
        }

    def describe(self) -> dict[str, Any]:
        """What a detector must know of the images that it will be given, as JSON."""
        first = self.reader.objects[0]
        sample = self.reader.read(first, "train", self.reader.ids(first, "train")[0])
        camera = sample.camera and dataclasses.asdict(sample.camera)
        return {
            "processing": dataclasses.asdict(self.processing),
            "camera": camera,
            "camera_width": sample.depth if sample.depth is None else sample.depth.shape[1],
        }

    def encode(self, samples: Iterable[Sample]) -> PreparedSet:
        """Prepares samples that are not kept, at least one, as those that are."""
        kept: list[Values] = []
        described: list[tuple[str, str, int]] = []
        remaining = iter(samples)
        while chunk := list(islice(remaining, ENCODED_AT_ONCE)):
            values = [self.processing(sample) for sample in chunk]
            self._encode(values)
            kept += values
            described += [(one.defect, one.id, self.reader.objects.index(one.object)) for one in chunk]
        arrays = {name: np.stack([values[name] for values in kept]) for name in self._names("test")}
        defects, ids, numbers = zip(*described, strict=True)
        return self._set(arrays, np.array(numbers, np.int32), "test", defects, ids)

    def _set(
        self, arrays: Any, object_id: Any, split: PreparedSplit, defects: tuple[str, ...], ids: tuple[str, ...]
    ) -> PreparedSet:
        features, images = (
            {m: arrays[f"{kind}_{m}"] for m in self.processing.modalities} for kind in ("features", "images")
        )
        truth = GroundTruth(**{name: arrays[name] for name in GroundTruth._fields}) if _has_truth(split) else None
        return PreparedSet(Batch(features, images, object_id), truth, defects, ids)

    def _folder_of(self, object_: str, split: PreparedSplit) -> Path:
        content = [FORMAT, self._settings()]
        return self.folder / f"{object_}-{split}-{records.digest(content)[:16]}"

    def _settings(self) -> Any:
        return [self.settings, dataclasses.asdict(self.processing), str(self.reader)]

    def _names(self, split: PreparedSplit) -> tuple[str, ...]:
        """The arrays that are kept; training images need no truth."""
        if split == "degraded":
            return tuple(f"mean_{m}" for m in self.processing.modalities)
        inputs = [f"{kind}_{m}" for kind in ("features", "images") for m in self.processing.modalities]
        return (*inputs, *(GroundTruth._fields if _has_truth(split) else ()))

    def _sources(self, object_: str, split: PreparedSplit, manifest: Manifest | None) -> list[Image]:
        """The images that there should be, by the hashes of their files."""
        files = {id_: copies.files(self.reader, object_, split, id_) for id_ in copies.ids(self.reader, object_, split)}
        if not files:
            raise UserError(f"{object_} has no {split} images; add some, or leave it out of config.dataset.objects.")
        known = {
            file: source
            for image in (manifest or {"images": []})["images"]
            for file, source in image["sources"].items()
        }
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda file: records.hashed(file, known.get(str(file))), sum(files.values(), ()))
            return [{"id": id_, "sources": {str(file): next(hashes) for file in of_id}} for id_, of_id in files.items()]

    def _is_current(self, home: Path, manifest: Manifest, images: list[Image], split: PreparedSplit) -> bool:
        """Whether a set holds these images, unharmed."""
        if [records.key(image) for image in manifest["images"]] != [records.key(image) for image in images]:
            return False
        folder = home / manifest["rows"]
        if folder not in self._checked:
            arrays = records.load(folder, self._names(split), len(images))
            for index, image in enumerate(manifest["images"]):
                values = records.row(arrays, index)
                if values is None or records.checksum(values) != image["crc32"]:
                    return False
            self._checked.add(folder)
        return True

    def _complete(
        self, home: Path, object_: str, split: PreparedSplit, images: list[Image], manifest: Manifest | None
    ) -> Manifest:
        """Prepares the images that no folder of the set holds unharmed, and makes the set of these images whole."""
        target = home / f"rows-{records.digest([records.key(image) for image in images])[:16]}"
        with records.Writer(target, len(images)) as writer:
            done = self._keep(home, target, split, images, manifest, writer)
            todo = [index for index in range(len(images)) if index not in done]
            bar = tqdm(total=len(images), initial=len(done), unit="image", disable=None, leave=False)
            bar.set_description(f"preparing {object_} {split}")
            with bar, ThreadPoolExecutor() as pool:
                ahead = self._ahead(pool, object_, split, [(index, images[index]) for index in todo])
                while chunk := list(islice(ahead, ENCODED_AT_ONCE)):
                    preemption.check()
                    self._encode([values for _, _, values in chunk])
                    written = {}
                    for index, image, values in chunk:
                        means = {f"mean_{m}": mean_tokens(values[f"features_{m}"]) for m in self.processing.modalities}
                        kept = {name: (values | means)[name] for name in self._names(split)}
                        writer.write(index, kept)
                        written[index] = Image(**image, crc32=records.checksum(kept))
                    writer.note(written)
                    done |= written
                    bar.update(len(chunk))
            manifest = Manifest(
                format=FORMAT,
                settings=self._settings(),
                rows=target.name,
                images=[done[index] for index in range(len(images))],
            )
            records.write_manifest(home, manifest)
            writer.finish()
        for other in home.glob("rows-*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        self._checked.add(target)
        return manifest

    def _keep(
        self,
        home: Path,
        target: Path,
        split: PreparedSplit,
        images: list[Image],
        manifest: Manifest | None,
        writer: records.Writer,
    ) -> dict[int, Image]:
        """Copies what earlier preparations left, whole or not, into the target; returns its rows."""
        found: dict[str, tuple[Image, Path, Values | None]] = {}
        for folder in sorted(home.glob("rows-*"), key=lambda folder: folder == target):  # its own are not copied
            if manifest is not None and folder.name == manifest["rows"]:
                noted, count = dict(enumerate(manifest["images"])), len(manifest["images"])
            else:
                noted, count = records.read_journal(folder)
            arrays = records.load(folder, self._names(split), count)
            found |= {records.key(image): (image, folder, records.row(arrays, at)) for at, image in noted.items()}
        done, damaged = {}, 0
        for index, image in enumerate(images):
            old, folder, values = found.get(records.key(image), (None, target, None))
            if old is None:
                continue
            if values is None or records.checksum(values) != old["crc32"]:
                damaged += 1
                continue
            done[index] = Image(**(old | image))
            if folder != target:
                writer.write(index, values)
                writer.note({index: done[index]})
        if damaged:
            print(f"{home}: {damaged} of {len(images)} images are damaged and prepared again.", file=sys.stderr)
        return done

    def _ahead(
        self, pool: ThreadPoolExecutor, object_: str, split: PreparedSplit, todo: list[tuple[int, Image]]
    ) -> Iterator[tuple[int, Image, Values]]:
        """Images as they are processed, in order, a bounded number ahead of those that are taken."""
        waiting: deque[tuple[int, Future[tuple[Image, Values]]]] = deque()
        for index, image in todo:
            waiting.append((index, pool.submit(self._process, object_, split, image)))
            if len(waiting) > _AHEAD:
                first, future = waiting.popleft()
                yield first, *future.result()
        for first, future in waiting:
            yield first, *future.result()

    def _process(self, object_: str, split: PreparedSplit, image: Image) -> tuple[Image, Values]:
        sample = copies.read(self.reader, object_, split, image["id"])
        return Image(**(image | _description(sample))), self.processing(sample)

    def _encode(self, chunk: list[Values]) -> None:
        """Adds the features of some images, filled up so that the backbone is compiled once."""
        for modality in self.processing.modalities:
            images = np.stack([values[f"images_{modality}"] for values in chunk])
            full = np.zeros((ENCODED_AT_ONCE, *images.shape[1:]), np.float32)
            full[: len(images)] = images
            features = np.asarray(self.encoder(full))[: len(images)]
            if not np.abs(features).max() <= np.finfo(np.float16).max:  # also NaN
                raise UserError("the backbone's features do not fit float16; use the weights it was trained to.")
            tokens = features.reshape(len(images), -1, features.shape[-1]).astype(np.float16)
            for values, own in zip(chunk, tokens, strict=True):
                values[f"features_{modality}"] = own


def _has_truth(split: PreparedSplit) -> bool:
    return split not in ("train", "varied")


def _description(sample: Sample) -> Image:
    valid = None if sample.depth is None else np.isfinite(sample.depth) & (sample.depth > 0)
    return Image(
        defect=sample.defect,
        size=list(sample.rgb.shape[:2]),
        invalid_depth=None if valid is None else float(1 - valid.mean()),
        mask_area=None if sample.mask is None else float(sample.mask.mean()),
    )


def _restamp(home: Path, manifest: Manifest, images: list[Image]) -> None:
    """Notes new times of files whose content is the same, if that can be done at once, so as not to hash them again."""
    stamped = [Image(**(old | new)) for old, new in zip(manifest["images"], images, strict=True)]
    if stamped != manifest["images"]:
        with suppress(OSError, UserError), locked(home / "lock"):
            if records.read_manifest(home) == manifest:
                records.write_manifest(home, Manifest(**(manifest | {"images": stamped})))


def mean_tokens(tokens: Float[jax.Array | np.ndarray, "*b p f"]) -> Float64[np.ndarray, "*b f"]:
    """The mean over an image's tokens, in float64."""
    return np.asarray(tokens).mean(-2, dtype=np.float64)


@partial(jax.jit, static_argnums=0)
def _features(extractor: FeatureExtractor, weights: Variables, images: Float[Array, "b h w 3"]) -> jax.Array:
    """The backbone's features; compiled once for all stores of a size."""
    features: Any = extractor.apply(weights, images)
    return features


def open_store(config: ConfigDict, reader: Reader, workdir: Path) -> Store:
    """Where images are prepared for this config's backbone."""
    processing = Processing(
        configs.modalities(config),
        config.input.size,
        config.input.depth_encoding,
        reader.height_range,
        reader.object_height,
        reader.normals_window,
    )
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid)
    weights = pretrained.load(config.backbone.name, config.backbone.weights)
    digest = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(weights)))
    return Store(
        folder=Path(config.dataset.prepared or workdir / "prepared"),
        reader=reader,
        processing=processing,
        encoder=partial(_features, extractor, jax.device_put(weights)),
        settings={**config.backbone, "weights": digest.hexdigest()},
    )
