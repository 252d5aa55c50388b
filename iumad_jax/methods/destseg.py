"""DeSTSeg (Zhang et al., CVPR 2023): a student denoises what a frozen teacher sees, a second network segments.

Teacher and student look at an image with a synthetic defect; the student learns to give the features that the teacher
gives for the image without it. Then the student is frozen, and a segmentation network learns to find the defect from
the products of both networks' normalised features. Its output is the anomaly map.

Our extensions: every modality has a student, and one segmentation network judges all modalities together; the teacher
is any convolutional backbone, whose features are z-scored; textures are drawn, defects in depth are bumps and dents,
and those of objects with depth lie on the object.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.errors import UserError
from iumad_jax.methods.mahalanobis import in_parts
from iumad_jax.methods.method import Loss, Method
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.models import pretrained
from iumad_jax.models.backbone import BACKBONES, FeatureExtractor, named, normalise
from iumad_jax.models.destseg import (
    AllImages,
    Head,
    Residual,
    Student,
    distances,
    focal_loss,
    products,
    resize,
)
from iumad_jax.runtime import devices
from iumad_jax.shapes import MAP_SIZE, Batch, ErrorMaps, Keys, Modality, Scalars, Variables
from iumad_jax.synthetic import Defective, make_defects, photographs, relief

LEVELS = (4, 8, 16)  # strides of the teacher's features
PHOTOGRAPHS = 256  # textures of a folder that a step draws from
_TOP_SIDE = 256  # side of the map of which `destseg.top` counts pixels

Levels = list[Float[Array, "b i j c"]]  # features at the levels


def destseg(config: ConfigDict) -> Method:
    """Build the method for a run's config, of which it uses `destseg`, `backbone`, `input` and `modality`.

    Raises:
        UserError: If a value of these is unknown, the backbone lacks the levels, or the depth encoding hides reliefs.
    """
    settings, modalities, encoding = config.destseg, configs.modalities(config), config.input.depth_encoding
    backbone = config.backbone
    _check(settings, backbone.name)
    if "depth" in modalities:
        relief.check_encoding(encoding)
    architecture = named(backbone.name).architecture
    of_levels = dict(zip(architecture.levels, architecture.channels_of_levels, strict=True))
    channels = tuple(of_levels[level] for level in LEVELS)
    extractor = FeatureExtractor(backbone.name, 1, ",".join(map(str, LEVELS)))
    # A ResNet18's features are outputs of ReLU, like those of the decoder, and as many.
    as_published = backbone.name == "resnet18" and not settings.standardise and settings.student_width == 64
    student = Student(settings.student_width, settings.norm, None if as_published else channels)
    residual = Residual(settings.segmentation_width, settings.norm)
    head = Head(settings.segmentation_width, settings.norm)
    networks = {f"student_{m}": student for m in modalities} | {"residual": residual, "head": head}

    def init(key: PRNGKeyArray, _: Batch) -> Variables:
        size, width = 32, settings.segmentation_width  # of images, which no array depends on
        sizes = [(size // level, size // level) for level in LEVELS]
        inputs: dict[str, Any] = {f"student_{m}": (jnp.zeros((1, size, size, 3)), sizes) for m in modalities}
        inputs |= {"residual": (jnp.zeros((1, *sizes[0], len(modalities) * sum(channels))),)}
        inputs |= {"head": (jnp.zeros((1, *sizes[0], width)),)}
        keys = jax.random.split(key, len(networks))
        made = {n: networks[n].init(k, *inputs[n], None) for n, k in zip(networks, keys, strict=True)}
        teacher = {m: {str(s): no_moments(c) for s, c in zip(LEVELS, channels, strict=True)} for m in modalities}
        return {
            "params": {name: variables["params"] for name, variables in made.items()},
            "statistics": {
                "norms": {name: variables.get("statistics", {}) for name, variables in made.items()},
                "teacher": teacher,
            },
        }

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        statistics = dict(variables["statistics"])
        if settings.textures and "rgb" in modalities and "photographs" not in statistics:
            folder, size = Path(settings.textures), batch.images["rgb"].shape[1]
            statistics["photographs"] = photographs.load(folder, PHOTOGRAPHS, size, step)
        if step == 0 and settings.standardise:
            statistics["teacher"] = {m: merge(variables, m, batch, statistics["teacher"][m]) for m in modalities}
        return variables | {"statistics": statistics}

    def merge(variables: Variables, m: Modality, batch: Batch, moments: dict[str, Any]) -> dict[str, Any]:
        for part in in_parts(batch.images[m]):
            for image in np.asarray(part, np.float32):
                outputs = extract(variables["frozen"], image[None])
                for level, output in zip(map(str, LEVELS), outputs, strict=True):
                    pixels = np.asarray(output).reshape(1, -1, output.shape[-1])
                    moments = moments | {level: merge_moments(moments[level], pixels)}
        return moments

    @jax.jit
    def extract(frozen: Any, images: Float[Array, "b h w 3"]) -> Levels:
        outputs: Any = extractor.apply(frozen, images, method="outputs")
        return outputs

    def fit(variables: Variables, batch: Batch, object_id: int, further: bool) -> Variables:
        """Drop the photographs of textures, which the step's training alone needs."""
        statistics = {name: value for name, value in variables["statistics"].items() if name != "photographs"}
        return variables | {"statistics": statistics}

    def teach(variables: Variables, m: Modality, images: Float[Array, "b h w 3"]) -> Levels:
        outputs = extract(variables["frozen"], images)
        if settings.standardise:
            moments = variables["statistics"]["teacher"][m]
            outputs = [standardise(x, moments[str(s)]) for s, x in zip(LEVELS, outputs, strict=True)]
        return jax.lax.stop_gradient(outputs)

    def apply(variables: Variables, name: str, *inputs: Any, training: AllImages | None = None) -> tuple[Any, Any]:
        """Return the output of a network, and its statistics after training."""
        statistics = variables["statistics"]["norms"][name]
        state = {"params": variables["params"][name], "statistics": statistics}
        if training is None:
            return networks[name].apply(state, *inputs, None), statistics
        output, changed = networks[name].apply(state, *inputs, training, mutable=["statistics"])
        return output, changed.get("statistics", {})

    def imitate(
        variables: Variables,
        m: Modality,
        images: Float[Array, "b h w 3"],
        like: Levels,
        training: AllImages | None = None,
    ) -> tuple[Levels, Any]:
        sizes = [x.shape[1:3] for x in like]
        return apply(variables, f"student_{m}", normalise(images, backbone.name), sizes, training=training)

    def segment(
        variables: Variables, pairs: dict[Modality, tuple[Levels, Levels]], training: AllImages | None = None
    ) -> tuple[Float[Array, "b h w"], Any]:
        x = jnp.concatenate([products(*pairs[m]) for m in modalities], axis=-1)
        x, residual_statistics = apply(variables, "residual", x, training=training)
        logits, head_statistics = apply(variables, "head", x, training=training)
        return logits, {"residual": residual_statistics, "head": head_statistics}

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        everything = all_images(batch)
        _check_batch(settings, batch)
        defective = spoil(variables, batch, keys)
        learns = in_first_phase(settings, batch.progress)
        taught = {m: teach(variables, m, jnp.where(learns, batch.images[m], defective.images[m])) for m in modalities}
        norms = variables["statistics"]["norms"]
        idle: Scalars = {name: jnp.zeros(()) for name in (*(f"distance_{m}" for m in modalities), "focal", "l1")}

        def train_student() -> Any:
            terms, means, changed = dict(idle), dict[str, Any](), dict[str, Any]()
            for m in modalities:
                student, changed[f"student_{m}"] = imitate(
                    variables, m, defective.images[m], taught[m], training=everything
                )
                levels = [distance.mean((1, 2)) for distance in distances(taught[m], student)]
                terms[f"distance_{m}"] = batch.mean(functools.reduce(jnp.add, levels))
                means |= mean_outputs(m, student)
            total = everything.count * functools.reduce(jnp.add, terms.values())  # as the release sums over a batch
            return total, terms, means, norms | changed

        def train_segmentation() -> Any:
            students = {
                m: jax.lax.stop_gradient(imitate(variables, m, defective.images[m], taught[m])[0]) for m in modalities
            }
            means: dict[str, Any] = {}
            for m in modalities:
                means |= mean_outputs(m, students[m])
            pairs = {m: (taught[m], students[m]) for m in modalities}
            logits, changed = segment(variables, pairs, everything)
            mask = shrink_mask(defective.mask, logits.shape[1:])
            terms = idle | {
                "focal": batch.mean(focal_loss(logits, mask, settings.gamma)),
                "l1": batch.mean(jnp.abs(mask - nn.sigmoid(logits)).mean((1, 2))),
            }
            return terms["focal"] + terms["l1"], terms, means, norms | changed

        total, terms, means, changed = jax.lax.cond(learns, train_student, train_segmentation)
        return Loss(total, terms, means, variables["statistics"] | {"norms": changed})

    def mean_outputs(m: Modality, student: Levels) -> dict[str, Any]:
        return {f"{m}_{stride}": x.mean((1, 2)) for stride, x in zip(LEVELS, student, strict=True)}

    def spoil(variables: Variables, batch: Batch, keys: Keys) -> Defective:
        """Make a synthetic defect in each image."""
        size = batch.images[modalities[0]].shape[1:3]
        allowed = None
        if batch.foreground is not None:
            allowed = jax.image.resize(batch.foreground.astype(jnp.float32), (len(keys), *size), "nearest") > 0.5
        images = {m: batch.images[m] for m in modalities}
        textures = variables["statistics"].get("photographs")
        others = next_images(batch, keys) if "rgb" in modalities and textures is None else None
        return make_defects(keys, images, allowed, encoding, False, others, textures)

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        pairs = {}
        for m in modalities:
            teacher = teach(variables, m, batch.images[m])
            pairs[m] = teacher, imitate(variables, m, batch.images[m], teacher)[0]
        if settings.map == "distance":
            maps = {m: functools.reduce(jnp.multiply, map(enlarge, distances(*pairs[m]))) for m in modalities}
            published = functools.reduce(jnp.add, maps.values())
        else:
            logits, _ = segment(variables, pairs)
            maps = {"+".join(modalities): enlarge(nn.softplus(logits))}  # -ln(1 - p) where the published map is p
            published = enlarge(nn.sigmoid(logits))
        return ErrorMaps(maps, None, published, top_mean(published, settings.top))

    def activations(variables: Variables, batch: Batch) -> dict[str, Any]:
        watched, pairs = {}, {}

        def watch(name: str, *inputs: Any) -> Any:
            state = {"params": variables["params"][name], "statistics": variables["statistics"]["norms"][name]}
            output, stored = networks[name].apply(state, *inputs, None, mutable=["activations"])
            if "activations" in stored:
                watched[name] = stored["activations"]
            return output

        for m in modalities:
            teacher = teach(variables, m, batch.images[m])
            sizes = [x.shape[1:3] for x in teacher]
            pairs[m] = teacher, watch(f"student_{m}", normalise(batch.images[m], backbone.name), sizes)
        watch("head", watch("residual", jnp.concatenate([products(*pairs[m]) for m in modalities], axis=-1)))
        return watched

    return Method(
        init,
        predict,
        loss,
        observe=observe,
        fit=fit,
        optimizer=functools.partial(make_optimizer, settings),
        hold=functools.partial(hold, settings),
        frozen=lambda: pretrained.load(backbone.name, backbone.weights),
        activations=activations,
    )


def _check(settings: ConfigDict, backbone: str) -> None:
    for key, known in (("norm", ("batch", "group")), ("map", ("segmentation", "distance"))):
        if settings[key] not in known:
            raise UserError(f'config.destseg.{key} is "{settings[key]}"; use {" or ".join(known)}.')
    if not set(LEVELS) <= set(named(backbone).architecture.levels):
        convolutional = [name for name in BACKBONES if not name.startswith("dinov2")]
        raise UserError(
            f"config.backbone.name is {backbone}, which has no features at the strides 4, 8 and 16 that destseg needs;"
            f" use one of {', '.join(convolutional)}."
        )


def _check_batch(settings: ConfigDict, batch: Batch) -> None:
    if settings.norm == "batch" and len(batch.object_id) * jax.lax.axis_size(devices.AXIS) == 1:
        raise UserError(
            "a step has one training image, which destseg's batch norm cannot normalise; add images, or start a run"
            " with --config.destseg.norm=group."
        )


def all_images(batch: Batch) -> AllImages:
    """Return how batch norm averages over a batch on all devices. Must be called within `devices.data_parallel`."""

    def mean(values: Float[Array, "b c"]) -> Float[Array, " c"]:
        weighted = values if batch.sample_weight is None else values * batch.sample_weight[:, None]
        return devices.mean_over_devices(weighted.mean(0))

    return AllImages(mean, devices.image_count(len(batch.object_id), batch.sample_weight))


def next_images(batch: Batch, keys: Keys) -> Float[Array, "b h w 3"] | None:
    """Return another photograph of the batch for each of this device's: the one whose key is the next larger.

    The result does not depend on how devices share the batch. None if the batch has one image.
    """
    if len(keys) * jax.lax.axis_size(devices.AXIS) == 1:
        return None
    words = jax.random.key_data(keys)[:, 0]
    gathered, own = (jax.lax.all_gather(x, devices.AXIS, tiled=True) for x in (batch.images["rgb"], words))
    repeated = jnp.zeros(len(own), bool)
    if batch.sample_weight is not None:
        repeated = jax.lax.all_gather(batch.sample_weight, devices.AXIS, tiled=True) == 0
    order = jnp.lexsort((own, repeated))  # repeated images come last
    count = devices.image_count(len(keys), batch.sample_weight)
    sorted_words = jnp.where(repeated, jnp.uint32(2**32 - 1), own)[order]
    rank = jnp.searchsorted(sorted_words, words)
    return gathered[order[(rank + 1) % count]]


def in_first_phase(settings: ConfigDict, progress: Float[Array, ""] | None) -> Bool[Array, ""]:
    """Return whether the student learns; the segmentation network learns afterwards."""
    return jnp.asarray(0.0 if progress is None else progress) < settings.first_phase


def shrink_mask(mask: Bool[Array, "b h w"], size: tuple[int, ...]) -> Float[Array, "b i j"]:
    """Reduce masks to the size of the logits; a pixel is 1 where interpolation gives at least a half."""
    rows, columns = size
    return (resize(mask[..., None].astype(jnp.float32), (rows, columns)) >= 0.5)[..., 0].astype(jnp.float32)


def enlarge(maps: Float[Array, "b i j"]) -> Float[Array, "b m m"]:
    """Enlarge maps to the size of anomaly maps."""
    return resize(maps[..., None], (MAP_SIZE, MAP_SIZE))[..., 0]


def top_mean(maps: Float[Array, "b m m"], top: int) -> Float[Array, " b"]:
    """Compute the mean of the largest values: of as large a share of the map as `top` pixels are of 256 x 256."""
    count = max(round(top * (MAP_SIZE / _TOP_SIDE) ** 2), 1)
    return jax.lax.top_k(maps.reshape(len(maps), -1), min(count, MAP_SIZE**2))[0].mean(-1)


def part_of(name: str) -> str:
    """Return the part of the networks, "student", "residual" or "head", to which a name in the parameters belongs."""
    return name.split("_")[0]


def make_optimizer(settings: ConfigDict, train: ConfigDict) -> optax.GradientTransformation:
    """Create SGD with momentum and an L2 penalty, with a learning rate of its own for each part, as in the release.

    The parts that a phase does not train keep their momenta. Updates are relative to `train.learning_rate`, by which
    the caller multiplies them.
    """

    def sgd(part: str, rate: float) -> optax.GradientTransformation:
        scale = optax.scale(rate / train.learning_rate if train.learning_rate else 0.0)
        steps = optax.add_decayed_weights(settings.decay), optax.trace(settings.momentum), scale
        inner = optax.flatten(optax.chain(*steps))  # XLA compiles it much faster for one vector

        def trains(step: Any, progress: Any = None, **_: Any) -> Bool[Array, ""]:
            return in_first_phase(settings, progress) == (part == "student")

        return optax.conditionally_mask(inner, trains, forward_extra_args=True)

    rates = {"student": settings.student_rate, "residual": settings.residual_rate, "head": settings.head_rate}
    optimizers = {part: sgd(part, rate) for part, rate in rates.items()}
    return optax.partition(optimizers, lambda params: {name: part_of(name) for name in params})


def hold(settings: ConfigDict, changes: Any, progress: Float[Array, ""] | None) -> Any:
    """Set the changes of the part that a phase does not train to zero."""
    first = in_first_phase(settings, progress)
    trained = {name: first == (part_of(name) == "student") for name in changes}
    return {name: jax.tree.map(lambda x, on=trained[name]: jnp.where(on, x, 0), part) for name, part in changes.items()}
