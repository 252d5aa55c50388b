"""A trained model as a function of images: numpy in, numpy out."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from iumad_jax import config as configs
from iumad_jax import methods
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.sample import Camera, Sample
from iumad_jax.errors import UserError
from iumad_jax.inference import anomaly_map, recognition
from iumad_jax.inference.decisions import decide
from iumad_jax.inference.recognition import RECOGNISE, Recogniser
from iumad_jax.inference.thresholds import Thresholds, thresholds
from iumad_jax.methods.method import Method, with_frozen
from iumad_jax.models import pretrained
from iumad_jax.models.efficientnet import FeatureExtractor
from iumad_jax.runtime import snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.shapes import Batch, Modality, Variables


class Detection(NamedTuple):
    """What a detector says about one image; about a batch, every field has a leading axis b."""

    score: Float32[np.ndarray, "*b"]
    map: Float32[np.ndarray, "*b m m"]  # anomaly map of 224 x 224 pixels
    mask: Bool[np.ndarray, "*b m m"]  # where the map is above the object's threshold for pixels
    anomalous: Bool[np.ndarray, "*b"]  # whether the score is above the object's threshold
    object: Any  # its name, a str or an array of them
    probability: Float32[np.ndarray, "*b"]  # that it is this object, given that it is one of those learned
    distance: Float32[np.ndarray, "*b"]  # of the image to the object, of `recognition.distances`
    unknown: Bool[np.ndarray, "*b"]  # whether the distance is above its threshold
    image_threshold: Float32[np.ndarray, "*b"]  # of the score
    pixel_threshold: Float32[np.ndarray, "*b"]  # of the map
    unknown_threshold: Float32[np.ndarray, "*b"]  # of the distance

    @property
    def decision(self) -> Any:
        """`good`, `anomalous`, or `unknown`, when the image may show anything and the rest means nothing."""
        return np.where(self.unknown, "unknown", np.where(self.anomalous, "anomalous", "good"))[()]


class State(NamedTuple):
    """All arrays of a trained model."""

    backbone: Variables
    variables: Variables
    recogniser: Recogniser
    thresholds: Thresholds


class Outputs(NamedTuple):
    """The same as `Detection`, with objects by number in the order of learning."""

    score: Float[Array, " b"]
    map: Float[Array, "b m m"]
    mask: Bool[Array, "b m m"]
    anomalous: Bool[Array, " b"]
    object_id: Int[Array, " b"]
    probability: Float[Array, " b"]
    distance: Float[Array, " b"]
    unknown: Bool[Array, " b"]
    image_threshold: Float[Array, " b"]
    pixel_threshold: Float[Array, " b"]
    unknown_threshold: Float[Array, " b"]


def detect(
    method: Method,
    extractor: FeatureExtractor,
    state: State,
    images: dict[Modality, Float[Array, "b h w 3"]],
    given: Int[Array, " b"],
) -> Outputs:
    """All that happens on the device.

    Args:
        method: of the run.
        extractor: the backbone.
        state: of a trained model.
        images: as `Processing` makes them, 0..255.
        given: each image's object, or RECOGNISE.
    """
    grids: dict[Modality, Any] = {m: extractor.apply(state.backbone, x) for m, x in images.items()}
    features = {m: grid.reshape(len(grid), -1, grid.shape[-1]) for m, grid in grids.items()}
    distance = recognition.distances(state.recogniser, features)
    object_id = recognition.recognise(distance, given)
    prediction = anomaly_map.predictor(method)(state.variables, Batch(features, images, object_id))
    decision = decide(state.thresholds, prediction, distance, object_id, len(state.recogniser.centre))
    return Outputs(score=prediction.score, map=prediction.map, **decision._asdict())


@dataclass(frozen=True)
class Detector:
    """Finds and localises defects with a trained model.

        detector = Detector.load(workdir)
        result = detector(rgb, depth)

    Attributes:
        objects: names of the learned objects, in the order of learning.
        step: after which step of the run this is the model.
        processing: how images are made ready.
        camera: of the training images' depth, at `camera_width` pixels; None without depth.
        function: (state, images, given) -> Outputs, see `detect`; compiled once for every number of images.
        state: its first argument.
    """

    objects: tuple[str, ...]
    step: int
    processing: Processing
    camera: Camera | None
    camera_width: int | None
    function: Callable[[State, dict[Modality, Any], Any], Outputs] = field(repr=False)
    state: State = field(repr=False)  # all weights

    @classmethod
    def load(cls, workdir: str | Path, step: int | None = None, **changes: Any) -> "Detector":
        """The model of a run as it was after a step, by default the last one finished.

        Args:
            workdir: of the run; its dataset is not needed.
            step: number of the step.
            changes: to keys of the run's config: `{"backbone.weights": PATH}` where they lie elsewhere now, or
                `{"model.scan": NAME}`.

        Raises:
            UserError: there is no such snapshot, it is damaged, the backbone's weights are not to be found, or another
                key is changed, by which a model was trained.
        """
        if not isinstance(workdir, str | Path) or not isinstance(step, Integral | None):
            raise UserError(f"workdir is {_kind(workdir)} and step {_kind(step)}; give a path and a number.")
        if others := set(changes) - {"backbone.weights", "model.scan"}:
            raise UserError(f"{', '.join(sorted(others))} cannot be changed; only backbone.weights and model.scan can.")
        config = workdirs.read(Path(workdir))
        config.update_from_flattened_dict(changes)
        progress = snapshots.read(Path(workdir), step)
        inputs = progress.inputs
        name, method = config.method, methods.build(config.method, config, len(progress.objects))
        variables = with_frozen(name, method, progress.variables[name], progress.frozen.get(name))
        extractor = FeatureExtractor(config.backbone.name, config.backbone.grid)

        state = State(
            pretrained.load(config.backbone.name, config.backbone.weights),
            jax.tree.map(jnp.asarray, variables),
            recognition.fit(progress.recognition),
            thresholds(progress.calibration, config.decisions.quantile),
        )
        return cls(
            tuple(progress.calibration),
            progress.position.step,
            Processing(**inputs["processing"] | {"modalities": configs.modalities(config)}),
            Camera(**inputs["camera"]) if inputs["camera"] else None,
            inputs["camera_width"],
            jax.jit(lambda state, images, given: detect(method, extractor, state, images, given)),
            state,
        )

    def __call__(
        self,
        rgb: UInt8[np.ndarray, "*b h w 3"],
        depth: Float[np.ndarray, "*b h w"] | None = None,
        camera: Camera | None = None,
        object: str | None = None,
    ) -> Detection:
        """Looks at one image or at a batch.

        Args:
            rgb: 0..255.
            depth: metres along the optical axis, not finite or 0 where missing; needed unless the model is of RGB
                alone, and pixel by pixel where `rgb` is.
            camera: of the depth image; by default the one that took the training images, at this image's width.
            object: which it is, if known; by default it is recognised.

        Raises:
            UserError: an argument is of a wrong type, shape or name, or the depth is of no use.
        """
        given, images = self.number(object), self.prepare(rgb, depth, camera)
        count = len(images[self.processing.modalities[0]])
        outputs = self.function(self.state, images, np.full(count, given, np.int32))
        found = jax.tree.map(np.asarray, outputs)._asdict()
        names = np.array(self.objects)[found.pop("object_id")]
        detection = Detection(**found, object=names)
        return Detection(*(field[0] for field in detection)) if rgb.ndim == 3 else detection

    def prepare(
        self,
        rgb: UInt8[np.ndarray, "*b h w 3"],
        depth: Float[np.ndarray, "*b h w"] | None = None,
        camera: Camera | None = None,
    ) -> dict[Modality, Float32[np.ndarray, "b s s 3"]]:
        """A batch of images as the backbone reads them, of one if one is given; arguments and errors as of a call."""
        if not _is_array(rgb) or rgb.dtype != np.uint8 or rgb.ndim not in (3, 4) or rgb.shape[-1] != 3:
            raise UserError(
                f"rgb is {_kind(rgb)}; give a NumPy array of uint8 of shape (rows, columns, 3), or a batch of them."
            )
        if not rgb.size:
            raise UserError(f"rgb has the shape {rgb.shape}; give at least one image with pixels.")
        if "depth" not in self.processing.modalities:
            depth = None
        elif depth is None:
            raise UserError("depth is missing; this model was trained with it.")
        elif not _is_array(depth) or depth.dtype.kind != "f" or depth.shape != rgb.shape[:-1]:
            raise UserError(
                f"depth is {_kind(depth)}; give a NumPy array of metres, floats of shape {rgb.shape[:-1]} as of rgb."
            )
        elif camera is None:
            assert self.camera is not None
            assert self.camera_width is not None
            camera = self.camera.scaled(rgb.shape[-2] / self.camera_width)
        elif not isinstance(camera, Camera):
            raise UserError(f"camera is {_kind(camera)}; give a Camera(fx, fy, cx, cy), in pixels.")
        if rgb.ndim == 3:
            rgb, depth = rgb[None], None if depth is None else depth[None]

        def of_one(index: int) -> dict[str, np.ndarray]:
            metres = None if depth is None else depth[index].astype(np.float32)
            name = "the image" if len(rgb) == 1 else f"image {index}"
            return self.processing(Sample(name, "given", "good", rgb[index], metres, None, False, camera))

        if len(rgb) == 1:  # a thread would only take its time to start
            arrays = [of_one(0)]
        else:
            with ThreadPoolExecutor() as pool:
                arrays = list(pool.map(of_one, range(len(rgb))))
        return {
            m: np.stack([one[f"images_{m}"] for one in arrays]).astype(np.float32) for m in self.processing.modalities
        }

    def number(self, name: str | None) -> int:
        """An object's place in the order of learning, RECOGNISE for none.

        Raises:
            UserError: it was not learned.
        """
        if name is None:
            return RECOGNISE
        if name not in self.objects:
            raise UserError(f'"{name}" is no object of this model; it learned {", ".join(self.objects)}.')
        return self.objects.index(name)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if _is_array(value) else f"a {type(value).__name__}"
