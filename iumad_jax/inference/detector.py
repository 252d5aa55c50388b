"""A trained model as a function from NumPy images to NumPy results."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from ml_collections import ConfigDict

from iumad_jax import methods
from iumad_jax.data.formats.depth_files import check_distance
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.region import Box
from iumad_jax.data.sample import Camera, DepthFormat, Sample
from iumad_jax.errors import UserError
from iumad_jax.inference import recognition
from iumad_jax.inference.anomaly_map import Rule, combine, make_rule
from iumad_jax.inference.decisions import decide
from iumad_jax.inference.detection import Detection, Processed
from iumad_jax.inference.recognition import RECOGNISE, Recogniser
from iumad_jax.inference.thresholds import Thresholds, choose, thresholds
from iumad_jax.methods.method import Method, with_frozen
from iumad_jax.models import pretrained
from iumad_jax.models.backbone import FeatureExtractor
from iumad_jax.runtime import snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.progress import Progress
from iumad_jax.shapes import Batch, Modality, Scales, Variables

_CHANGEABLE = *workdirs.FILES, "model.scan", "model.dtype"


class State(NamedTuple):
    """All arrays of a trained model."""

    backbone: Variables
    variables: Variables  # arranged (`Method.arrange`)
    scales: Scales
    recogniser: Recogniser
    thresholds: Thresholds


class Outputs(NamedTuple):
    """Fields of `Detection` as device arrays, with object numbers (in the order of learning) in place of names."""

    score: Float[Array, " b"]
    map: Float[Array, "b *t m m"]
    mask: Bool[Array, "b *t m m"]
    anomalous: Bool[Array, " b"]
    object_id: Int[Array, " b"]
    probability: Float[Array, " b"]
    distance: Float[Array, " b"]
    embedding: Float[Array, "b c"]
    unknown: Bool[Array, " b"]
    image_threshold: Float[Array, " b"]
    pixel_threshold: Float[Array, " b"]
    unknown_threshold: Float[Array, " b"]


def detect(
    method: Method,
    rule: Rule,
    extractor: FeatureExtractor,
    state: State,
    images: dict[Modality, Float[Array, "r h w 3"]],
    specified_id: Int[Array, " b"],
    tiles: int = 1,
) -> Outputs:
    """Compute a detector's outputs for a batch, on the device; of images of several tiles, maps (b, t, m, m).

    Args:
        method: Method of the run.
        rule: How its error maps become anomaly maps and scores.
        extractor: Backbone.
        state: Arrays of the trained model.
        images: Images from `Detector.prepare`, with values 0 to 255.
        specified_id: Number of each image's object; RECOGNISE where the model is to recognise it.
        tiles: Number of tiles of an image.
    """
    grids: dict[Modality, Any] = {m: extractor.apply(state.backbone, x) for m, x in images.items()}
    features = {m: grid.reshape(len(grid), -1, grid.shape[-1]) for m, grid in grids.items()}
    distance = recognition.of_images(recognition.distances(state.recogniser, features), tiles)
    embedding = recognition.whitened(state.recogniser, recognition.joint_means(features))
    object_id = recognition.recognise(distance, specified_id)
    of_tiles = object_id if tiles == 1 else jnp.repeat(object_id, tiles)
    errors = method.predict(state.variables, Batch(features, images, of_tiles))
    prediction = combine(errors, state.scales, of_tiles, rule)
    if tiles > 1:
        maps, score, embedding = (
            x.reshape(-1, tiles, *x.shape[1:]) for x in (prediction.map, prediction.score, embedding)
        )
        prediction, embedding = prediction._replace(map=maps, score=score.max(1)), embedding.mean(1)
    decision = decide(state.thresholds, prediction, distance, object_id, len(state.recogniser.centre))
    return Outputs(score=prediction.score, map=prediction.map, embedding=embedding, **decision._asdict())


@dataclass(frozen=True)
class Detector:
    """Anomaly detector: a trained model that detects and localises defects in images.

        detector = Detector.load("runs/my_run")
        detection = detector(rgb, depth)  # NumPy arrays: uint8 (h, w, 3), metres (h, w)
        print(detection.decision, detection.object, detection.score)
        detector = detector.refresh()  # knows what the run has learned meanwhile

    Attributes:
        workdir: Absolute path of the workdir of the run.
        changes: Replaced values of the run's config, see `load`.
        threshold: Thresholds that replace those of the run, see `load`.
        objects: Names of the learned objects, in the order of learning.
        retired: Names of those that are no longer recognised.
        step: Number of the run's step after which the model was saved.
        processing: Preprocessing of images.
        depth_format: What the numbers in the training images' depth files mean.
        camera: Camera of the training images' depth, for images `camera_width` pixels wide; None without depth.
        camera_width: Image width in pixels that `camera` refers to; None without depth.
        function: Jitted function (state, images, specified_id) -> Outputs, see `detect`. It is compiled once per number
            of images.
        state: First argument of `function`: weights, recogniser and thresholds.
    """

    workdir: Path
    changes: dict[str, Any]
    threshold: float | Mapping[str, float] | None
    objects: tuple[str, ...]
    retired: tuple[str, ...]
    step: int
    processing: Processing
    depth_format: DepthFormat
    camera: Camera | None
    camera_width: int | None
    function: Callable[[State, dict[Modality, Any], Any], Outputs] = field(repr=False)
    state: State = field(repr=False)

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        step: int | None = None,
        *,
        quantile: float | None = None,
        threshold: float | Mapping[str, float] | None = None,
        **changes: Any,
    ) -> "Detector":
        """Load the model that a run had after a step. The dataset of the run is not needed.

        Args:
            workdir: Workdir of the run.
            step: Number of a finished step; the last one by default.
            quantile: Share of good images that should be decided good, from 0.5 to 1; that of the run by default. All
                thresholds are computed anew from the scores of the calibration images.
            threshold: Threshold of anomaly scores for all objects, or thresholds by name. The threshold of the map
                changes by the same factor. By default, thresholds follow from the quantile.
            changes: Replaced values of the run's config, for few keys: `**{"backbone.weights": PATH}`,
                `diffusion.weights` and `diffusion.autoencoder` if these files were moved, and `model.scan` and
                `model.dtype`, which change how the same numbers are computed.

        Raises:
            UserError: If the snapshot is missing or damaged, if weights cannot be found or are others, if a threshold
                or the quantile is out of range or of an unknown object, or if `changes` has another key.
        """
        if not isinstance(workdir, str | Path) or not isinstance(step, Integral | None):
            raise UserError(f"workdir is {_kind(workdir)} and step is {_kind(step)}; pass a path and an integer.")
        if fixed := set(changes) - set(_CHANGEABLE):
            known = f"{', '.join(_CHANGEABLE[:-1])} and {_CHANGEABLE[-1]}"
            raise UserError(f"{', '.join(sorted(fixed))} cannot be changed; only {known} can.")
        progress = snapshots.read(Path(workdir), step)
        choose(threshold, quantile, progress.calibration)
        if quantile is not None:
            changes = changes | {"decisions.quantile": float(quantile)}
        config = _read_config(Path(workdir), changes)
        backbone = pretrained.load(config.backbone.name, config.backbone.weights)
        pretrained.check_same(config.backbone, pretrained.sha256(backbone), progress.inputs)
        return cls._build(Path(workdir).absolute(), changes, threshold, config, progress, jax.device_put(backbone))

    @classmethod
    def _build(
        cls,
        workdir: Path,
        changes: dict[str, Any],
        threshold: float | Mapping[str, float] | None,
        config: ConfigDict,
        progress: Progress,
        backbone: Variables,
    ) -> "Detector":
        inputs = progress.inputs
        name, method = config.method, methods.build(config.method, config)
        rule = make_rule(config)
        variables = with_frozen(name, method, progress.variables[name], progress.frozen.get(name))
        extractor = FeatureExtractor(config.backbone.name, config.backbone.grid, config.backbone.levels)

        state = State(
            backbone,
            jax.device_put(method.arrange(variables)),
            progress.scales[name],
            recognition.fit(progress.recognition, progress.retired),
            thresholds(progress.calibration, config.decisions.quantile, choose(threshold, None, progress.calibration)),
        )
        return cls(
            workdir,
            changes,
            threshold,
            progress.objects,
            tuple(progress.objects[number] for number in progress.retired),
            progress.position.step,
            Processing.recorded(inputs),
            DepthFormat.recorded(inputs["depth"]),
            Camera(**inputs["camera"]) if inputs["camera"] else None,
            inputs["camera_width"],
            jax.jit(
                lambda state, images, specified_id: detect(
                    method, rule, extractor, state, images, specified_id, Processing.recorded(inputs).tiling.count
                )
            ),
            state,
        )

    def refresh(self) -> "Detector":
        """Return a detector of the run's last finished step, or this detector if it is of that step.

        This detector is not changed, so other threads may go on using it. A snapshot that is still being written does
        not count yet. If all newer snapshots are damaged, this is printed to stderr and this detector is returned. The
        backbone's weights are shared with the new detector, whose first call compiles.
        """
        if snapshots.last_step(self.workdir) <= self.step:
            return self
        try:
            progress = snapshots.read(self.workdir, after=self.step)
            config = _read_config(self.workdir, self.changes)
            return self._build(self.workdir, self.changes, self.threshold, config, progress, self.state.backbone)
        except UserError as error:
            print(f"iumad_jax: {error} The detector of step {self.step} is kept.", file=sys.stderr)
            return self

    def __call__(
        self,
        rgb: UInt8[np.ndarray, "*b h w 3"] | None = None,
        depth: Float[np.ndarray, "*b h w"] | None = None,
        camera: Camera | None = None,
        object: str | None = None,
    ) -> Detection:
        """Detect anomalies in one image or in a batch of images.

        Args:
            rgb: Image of shape (h, w, 3) or batch of shape (b, h, w, 3), uint8 from 0 to 255. Required unless the
                model was trained on depth alone.
            depth: Depth in metres along the optical axis, floats of shape (h, w) or (b, h, w), aligned with `rgb` pixel
                by pixel; 0 or not finite where missing. If the model was trained on height maps, heights in metres
                instead, not finite where missing. Required unless the model was trained on RGB alone.
            camera: Camera of the depth image; by default that of the training images, scaled to this image's width.
            object: Name of the object that all images show; recognised per image by default.

        Returns:
            The detection, without batch axis for a single image.

        Raises:
            UserError: If an argument has a wrong type or shape, if the object was not learned or is retired, or if the
                depth cannot be used.
        """
        processed = self.process(rgb, depth, camera)
        if depth is not None:
            self.check_metres(depth)
        detection = processed.place(self.judge(processed.images, object))
        single = depth.ndim == 2 if rgb is None and depth is not None else rgb is not None and rgb.ndim == 3
        return Detection(*(field[0] for field in detection)) if single else detection

    def prepare(
        self,
        rgb: UInt8[np.ndarray, "*b h w 3"] | None = None,
        depth: Float[np.ndarray, "*b h w"] | None = None,
        camera: Camera | None = None,
    ) -> dict[Modality, Float32[np.ndarray, "b s s 3"]]:
        """Preprocess images for the backbone. Takes the same arguments and raises the same errors as a call.

        Returns:
            Images by modality, shape (b, s, s, 3) with values 0 to 255; b is 1 for a single image, times the number of
            tiles.
        """
        return self.process(rgb, depth, camera).images

    def process(
        self,
        rgb: UInt8[np.ndarray, "*b h w 3"] | None = None,
        depth: Float[np.ndarray, "*b h w"] | None = None,
        camera: Camera | None = None,
    ) -> Processed:
        """Preprocess images as `prepare` does, and tell which part of them is seen."""
        if depth is None and "depth" in self.processing.modalities:
            raise UserError("depth is missing; pass it, since this model was trained with depth.")
        if rgb is None and depth is not None and _is_array(depth) and "rgb" not in self.processing.modalities:
            rgb = np.zeros((*depth.shape, 3), np.uint8)  # unused
        if rgb is None or not _is_array(rgb) or rgb.dtype != np.uint8 or rgb.ndim not in (3, 4) or rgb.shape[-1] != 3:
            raise UserError(
                f"rgb is {_kind(rgb)}; pass a NumPy array of uint8, shape (rows, columns, 3) or (b, rows, columns, 3)."
            )
        if not rgb.size:
            raise UserError(f"rgb has the shape {rgb.shape}; pass at least one image with at least one pixel.")
        if "depth" not in self.processing.modalities or depth is None:
            depth = None
        elif not _is_array(depth) or depth.dtype.kind != "f" or not self._is_of(depth.shape, rgb.shape[:-1]):
            raise UserError(
                f"depth is {_kind(depth)}; pass a NumPy array of metres, floats of shape {rgb.shape[:-1]} like rgb."
            )
        elif camera is None:
            camera = self.default_camera(depth.shape[-1])
        elif not isinstance(camera, Camera):
            raise UserError(f"camera is {_kind(camera)}; pass a Camera(fx, fy, cx, cy) in pixels.")
        photographs = rgb if rgb.ndim == 4 else rgb[None]
        if depth is not None and rgb.ndim == 3:
            depth = depth[None]

        def process(index: int) -> dict[str, np.ndarray]:
            metres = None if depth is None else depth[index].astype(np.float32)
            return self.processing(Sample("image", str(index), "good", photographs[index], metres, None, False, camera))

        if len(photographs) == 1:  # starting a thread would only add delay
            processed = [process(0)]
        else:
            with ThreadPoolExecutor() as pool:
                processed = list(pool.map(process, range(len(photographs))))
        images = {
            modality: np.concatenate([self._by_tile(arrays[f"images_{modality}"]) for arrays in processed])
            for modality in self.processing.modalities
        }
        boxes = tuple(Box(*arrays["box"]) for arrays in processed)
        whole = not self.processing.region and self.processing.tiling.count == 1
        return Processed(images, boxes, photographs.shape[1:3], self.processing.tiling, whole)

    def check_metres(self, depth: Float[np.ndarray, "*b h w"]) -> None:
        """Raise UserError if the median of depth is no plausible distance in metres, as in a wrong unit."""
        measured = depth[np.isfinite(depth) & (depth != 0)]
        if "depth" in self.processing.modalities and not self.depth_format.heights and measured.size:
            check_distance(measured[None], Path("the depth image"), "pass metres")

    def _by_tile(self, image: np.ndarray) -> Float32[np.ndarray, "t s s 3"]:
        return image.reshape(self.processing.tiling.count, *image.shape[-3:]).astype(np.float32)

    def judge(self, images: dict[Modality, Float32[np.ndarray, "r s s 3"]], object: str | None = None) -> Detection:
        """Detect anomalies in a batch of prepared images, see `prepare`; maps are of 224 x 224 pixels per tile.

        Raises:
            UserError: If the object was not learned or is retired.
        """
        count = len(images[self.processing.modalities[0]]) // self.processing.tiling.count
        outputs = self.function(self.state, images, np.full(count, self.object_number(object), np.int32))
        fields = jax.tree.map(np.asarray, outputs)._asdict()
        names = np.array(self.objects)[fields.pop("object_id")]
        return Detection(**fields, object=names)

    def compile(self) -> None:
        """Compile the function for single images, which the first call would do otherwise."""
        shape = self.processing.tiling.count, self.processing.size, self.processing.size, 3
        self.judge({modality: np.zeros(shape, np.float32) for modality in self.processing.modalities})

    def _is_of(self, depth: tuple[int, ...], rgb: tuple[int, ...]) -> bool:
        """Whether an array of depth may belong to photographs, which may have another resolution if the run's had."""
        if self.depth_format.align == "resize":
            return len(depth) == len(rgb) and depth[:-2] == rgb[:-2] and 0 not in depth
        return depth == rgb

    def default_camera(self, width: int) -> Camera:
        """Return the camera of the training images, scaled to images of a width in pixels; requires depth.

        Pixels of height maps keep their size, whatever the width.
        """
        assert self.camera is not None
        assert self.camera_width is not None
        if self.camera.heights:
            return self.camera
        return self.camera.scaled(width / self.camera_width)

    def object_number(self, name: str | None) -> int:
        """Return an object's number in the order of learning, or RECOGNISE if the name is None.

        Raises:
            UserError: If the object was not learned or is retired.
        """
        if name is None:
            return RECOGNISE
        if name not in self.objects or name in self.retired:
            problem = "is retired" if name in self.retired else "is not an object of this model"
            remaining = ", ".join(other for other in self.objects if other not in self.retired)
            raise UserError(f'"{name}" {problem}; choose one of {remaining}.')
        return self.objects.index(name)


def _read_config(workdir: Path, changes: dict[str, Any]) -> ConfigDict:
    config = workdirs.read(workdir)
    config.update_from_flattened_dict(changes)
    return config


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)


def _kind(value: Any) -> str:
    """Describe a value for an error message: its dtype and shape if it is an array, else its type."""
    return f"{value.dtype} of shape {value.shape}" if _is_array(value) else f"a {type(value).__name__}"
