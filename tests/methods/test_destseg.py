"""DeSTSeg: its losses, phases, optimisers, defects and maps, against computations from their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iumad_jax.config import check, paper, small
from iumad_jax.errors import UserError
from iumad_jax.inference.anomaly_map import make_rule
from iumad_jax.methods import build
from iumad_jax.methods.destseg import make_optimizer, next_images, shrink_mask, top_mean
from iumad_jax.methods.method import with_frozen
from iumad_jax.models.backbone import FeatureExtractor, normalise
from iumad_jax.models.destseg import AllImages, Student
from iumad_jax.runtime import devices
from iumad_jax.shapes import Batch
from iumad_jax.synthetic import make_defects

SIZE, IMAGES = 32, 4
BOTH = ("rgb", "depth")
KEYS = jax.random.split(jax.random.key(3), IMAGES)


def make_config(modality="rgb+depth", strategy="finetune", **keys):
    config = small("1-1")
    config.method, config.modality, config.backbone.weights = "destseg", modality, "random"
    config.continual.strategy = strategy
    config.continual.replay.update(rank=2, image_size=SIZE)
    config.destseg.update({"student_width": 2, "segmentation_width": 4, **keys})
    return config


def batch(count=IMAGES, seed=0, modalities=BOTH, foreground=True):
    rng = np.random.default_rng(seed)
    images = {m: rng.uniform(0, 255, (count, SIZE, SIZE, 3)).astype(np.float32) for m in modalities}
    if "depth" in images:
        normals = rng.normal([0, 0, 3], size=(count, SIZE, SIZE, 3))
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        images["depth"] = (127.5 + 127.5 * normals).astype(np.float32)
    features = {m: rng.normal(size=(count, 4, 5)).astype(np.float32) for m in modalities}
    allowed = np.full((count, 224, 224), foreground)
    return Batch(features, images, np.zeros(count, np.int32), foreground=allowed)


def variables_of(method, images):
    variables = with_frozen("destseg", method, jax.jit(method.init)(jax.random.key(0), images))
    return jax.tree.map(np.asarray, method.observe(variables, images, 0))


@pytest.fixture(scope="module")
def method(fast_compilation):
    return build("destseg", make_config())


@pytest.fixture(scope="module")
def variables(method):
    return variables_of(method, batch())


@pytest.fixture(scope="module")
def losses(method):
    """Return a function that computes the loss of a batch on one device."""
    run = jax.jit(jax.vmap(method.loss, in_axes=(None, 0, 0), axis_name=devices.AXIS))
    return lambda variables, batch, progress, keys=KEYS: run(variables, shared(batch, 1, progress), keys[None])


def shared(batch, count, progress):
    """Share a batch among a number of devices as `data.batches` does for those of the machine."""
    images = len(batch.object_id)
    places = -(-images // count) * count
    rows = np.concatenate([np.arange(images), np.zeros(places - images, int)]).reshape(count, -1)
    divided = jax.tree.map(lambda array: array[rows], batch)
    weight = (np.arange(places) < images).astype(np.float32).reshape(count, -1) * places / images
    return divided._replace(
        sample_weight=weight if places > images else None, progress=np.full(count, progress, np.float32)
    )


@jax.jit
def levels(frozen, images):
    return FeatureExtractor("efficientnet_lite0", 1, "4,8,16").apply(frozen, images, method="outputs")


def extract(variables, images):
    """Return the z-scored features of the teacher at the strides 4, 8 and 16 in float64, by modality."""
    features = {}
    for m, x in images.items():
        moments = variables["statistics"]["teacher"][m]
        outputs = levels(variables["frozen"], x)
        features[m] = [
            (np.asarray(y, np.float64) - moments[s]["mean"]) / np.sqrt(moments[s]["variance"].astype(np.float64) + 1e-6)
            for s, y in zip(("4", "8", "16"), outputs, strict=True)
        ]
    return features


def defective_copies(images, keys=KEYS, foreground=None):
    """Return the defects that the loss makes on one device."""
    others = jax.vmap(next_images, axis_name=devices.AXIS)(shared(images, 1, 0.0), keys[None])[0]
    return jax.jit(make_defects, static_argnums=(3, 4))(keys, images.images, foreground, "normals", False, others)


def cosines(a, b):
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.where(lengths > 0, lengths, 1)


def imitate(variables, m, images, sizes, training=None):
    state = {
        "params": variables["params"][f"student_{m}"],
        "statistics": variables["statistics"]["norms"][f"student_{m}"],
    }
    x, student = normalise(images, "efficientnet_lite0"), Student(2, "batch", (24, 40, 112))
    return jax.jit(lambda state, x: student.apply(state, x, sizes, training, mutable=["statistics"])[0])(state, x)


def test_moments_of_the_teacher_are_those_of_the_images_of_the_base_step(method, variables):
    """The variables have seen the first images."""
    images = [batch(seed=seed) for seed in (0, 1)]
    observed = method.observe(variables, images[1], 0)
    for m in BOTH:
        pixels = [np.asarray(levels(variables["frozen"], part.images[m])[1]) for part in images]
        rows = np.concatenate(pixels).reshape(-1, 40).astype(np.float64)
        moments = observed["statistics"]["teacher"][m]["8"]
        np.testing.assert_allclose(moments["mean"], rows.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments["variance"], rows.var(0), rtol=1e-3, atol=1e-4)
    later = method.observe(variables, images[1], 1)
    jax.tree.map(np.testing.assert_array_equal, later["statistics"], variables["statistics"])


def test_phase_1_compares_the_student_of_the_defective_image_with_the_teacher_of_the_good_one(losses, variables):
    images = batch()
    defective = defective_copies(images)
    assert defective.mask.any((1, 2)).sum() >= 3
    result = losses(variables, images, 0.1)
    clean, spoilt = extract(variables, images.images), extract(variables, defective.images)
    together = AllImages(lambda values: values.mean(0), IMAGES)
    for m in BOTH:
        sizes = [x.shape[1:3] for x in clean[m]]
        student = imitate(variables, m, defective.images[m], sizes, together)
        expected = sum(
            (1 - cosines(t, np.asarray(b, np.float64))).mean() for t, b in zip(clean[m], student, strict=True)
        )
        wrong = sum((1 - cosines(t, np.asarray(b, np.float64))).mean() for t, b in zip(spoilt[m], student, strict=True))
        np.testing.assert_allclose(result.terms[f"distance_{m}"][0], expected, rtol=1e-4)
        assert m == "depth" or abs(wrong - expected) > 5e-4 * expected
        np.testing.assert_allclose(result.outputs[f"{m}_8"][0], student[1].mean((1, 2)), rtol=1e-3, atol=1e-4)
    total = sum(result.terms[f"distance_{m}"][0] for m in BOTH)
    np.testing.assert_allclose(result.total[0], IMAGES * total, rtol=1e-6)  # a sum over the batch
    assert result.terms["focal"] == result.terms["l1"] == 0


def test_phase_2_compares_the_segmentation_with_the_mask(losses, variables, method):
    """The probability of one half everywhere costs 0.0433 + 0.5; a bias decides everything else."""
    images = batch()
    mask = np.stack([shrink(mask) for mask in np.asarray(defective_copies(images).mask)])
    for bias in (0.0, 2.0, -100.0, 100.0):
        params = jax.tree.map(np.array, variables["params"])
        classifier = params["head"]["classifier"]
        params["head"]["classifier"] = {"kernel": 0 * classifier["kernel"], "bias": np.full(1, bias, np.float32)}
        result = losses(variables | {"params": params}, images, 0.2)
        p = np.where(mask, 1 / (1 + np.exp(-bias)), 1 / (1 + np.exp(bias)))  # of the truth
        surprise = np.where(mask, np.logaddexp(0, -bias), np.logaddexp(0, bias))
        np.testing.assert_allclose(result.terms["focal"], ((1 - p) ** 4 * surprise).mean(), rtol=1e-4)
        np.testing.assert_allclose(result.terms["l1"], (1 - p).mean(), rtol=1e-4)
        np.testing.assert_allclose(result.total, result.terms["focal"] + result.terms["l1"], rtol=1e-6)
        assert result.terms["distance_rgb"] == 0
        if bias == 0:
            np.testing.assert_allclose(result.total, 0.0433217 + 0.5, rtol=1e-5)


def shrink(mask):
    """Reduce a mask to a quarter of its side: 1 where two of the central four of 4 x 4 pixels are."""
    side = len(mask) // 4
    blocks = mask.reshape(side, 4, side, 4)[:, 1:3, :, 1:3]
    return blocks.sum((1, 3)) >= 2


def test_masks_are_reduced_by_their_central_pixels():
    mask = np.zeros((3, 4, 4), bool)
    mask[0, 1, 1:3] = True  # two of the central four
    mask[1, 2, 1] = True  # one
    mask[2] = True
    mask[2, 1:3, 1:3] = False  # the twelve outer ones
    np.testing.assert_array_equal(shrink_mask(jnp.asarray(mask), (1, 1)).ravel(), [1, 0, 0])
    random = np.random.default_rng(0).uniform(size=(2, 32, 32)) < 0.4
    np.testing.assert_array_equal(shrink_mask(jnp.asarray(random), (8, 8)), [shrink(x) for x in random])


def test_depth_shows_no_defects_off_the_object(method, variables, losses):
    """The loss of images without foreground is that of images that stay good."""
    params = jax.tree.map(np.array, variables["params"])
    params["head"]["classifier"] = jax.tree.map(np.zeros_like, params["head"]["classifier"])
    params["head"]["classifier"]["bias"] += 3
    somewhere = losses(variables | {"params": params}, batch(), 0.9)
    good = losses(variables | {"params": params}, batch(foreground=False), 0.9)
    p = 1 / (1 + np.exp(-3.0))
    np.testing.assert_allclose(good.terms["l1"], p, rtol=1e-5)  # the mask is empty
    assert somewhere.terms["l1"][0] < p - 1e-3


@pytest.mark.parametrize(("count", "images"), [(1, 5), (4, 8), (3, 7)])
def test_textures_come_from_another_image_whatever_the_devices(count, images):
    data, keys = batch(images, 6), jax.random.split(jax.random.key(9), images)
    whole = jax.vmap(next_images, axis_name=devices.AXIS)(shared(data, 1, 0.0), keys[None])[0]
    sources = [next(j for j in range(images) if np.array_equal(x, data.images["rgb"][j])) for x in np.asarray(whole)]
    assert sorted(sources) == list(range(images))  # each one once, and never the image itself
    assert all(i != j for i, j in enumerate(sources))
    divided = shared(data, count, 0.0)
    split_keys = jax.random.split(jax.random.key(1), divided.object_id.size).at[:images].set(keys)
    split_keys = split_keys.reshape(divided.object_id.shape)
    found = jax.vmap(next_images, axis_name=devices.AXIS)(divided, split_keys)
    np.testing.assert_array_equal(np.asarray(found).reshape(-1, SIZE, SIZE, 3)[:images], whole)


def test_defects_differ_between_images_and_updates(losses, variables):
    same = jax.tree.map(lambda array: np.repeat(array[:1], IMAGES, 0), batch())
    totals = {
        float(losses(variables, same, 0.5, keys=jax.random.split(jax.random.key(k), IMAGES)).total[0]) for k in range(3)
    }
    assert len(totals) == 3


def test_each_part_has_its_rate_and_nothing_is_clipped():
    config = paper("1-1")
    optimizer = make_optimizer(config.destseg, config.train)
    params = {name: {"kernel": jnp.full((2, 2), 3.0)} for name in ("student_rgb", "student_depth", "residual", "head")}
    gradients, moved = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params), {}
    for progress in (0.0, 0.3):
        directions, _ = optimizer.update(gradients, optimizer.init(params), params, progress=np.float32(progress))
        moves = optax.apply_updates(params, jax.tree.map(lambda x: -config.train.learning_rate * x, directions))
        moved[progress] = {name: 3 - float(part["kernel"][0, 0]) for name, part in moves.items()}
    gradient = 100 + 1e-4 * 3
    assert moved[0.0] == pytest.approx(
        {"student_rgb": 0.4 * gradient, "student_depth": 0.4 * gradient, "residual": 0, "head": 0}, rel=1e-5
    )
    assert moved[0.3] == pytest.approx(
        {"student_rgb": 0, "student_depth": 0, "residual": 0.1 * gradient, "head": 0.01 * gradient}, rel=1e-5
    )


def test_momentum_is_that_of_pytorchs_sgd():
    """The release's optimiser: v = 0.9 v + gradient + decay w, w = w - rate v."""
    config = paper("1-0")
    config.destseg.decay = 0.1
    optimizer = make_optimizer(config.destseg, config.train)
    params = {name: {"kernel": jnp.array([1.0])} for name in ("student_rgb", "residual", "head")}
    state, w, v = optimizer.init(params), 1.0, 0.0
    for gradient in (2.0, -1.0, 0.5):
        gradients = jax.tree.map(lambda x, gradient=gradient: jnp.full_like(x, gradient), params)
        directions, state = optimizer.update(gradients, state, params, progress=0.5)
        params = optax.apply_updates(params, jax.tree.map(lambda x: -config.train.learning_rate * x, directions))
        v = 0.9 * v + gradient + 0.1 * w
        w -= 0.01 * v
        np.testing.assert_allclose(params["head"]["kernel"], w, rtol=1e-5)


def test_maps_are_the_segmentation_enlarged_with_half_pixel_centres(method, variables):
    images = batch()
    errors = jax.jit(method.predict)(variables, images)
    assert set(errors.maps) == {"rgb+depth"}
    published = np.asarray(errors.published)
    np.testing.assert_allclose(-np.log1p(-published[:, ::28, ::28]), errors.maps["rgb+depth"][:, ::28, ::28], rtol=0.02)
    corner = published[:, :14, :14]  # half of the first pixel of 8 x 8, before which nothing is interpolated
    np.testing.assert_allclose(corner, np.broadcast_to(corner[:, :1, :1], corner.shape), rtol=1e-5)
    largest = np.sort(published.reshape(IMAGES, -1))[:, -77:]  # 100 of 256 x 256 pixels
    np.testing.assert_allclose(errors.score, largest.mean(1), rtol=1e-5)
    assert errors.object_logits is None


def test_an_image_has_the_same_map_alone_and_in_a_batch(method, variables):
    images, predict = batch(seed=8), jax.jit(method.predict)
    together = predict(variables, images)
    alone = predict(variables, jax.tree.map(lambda array: np.repeat(array[2:3], IMAGES, 0), images))
    np.testing.assert_allclose(alone.published[0], together.published[2], rtol=1e-5)


def test_the_distance_map_is_a_product_over_levels(variables):
    method = build("destseg", make_config(map="distance"))
    images = batch(2)
    errors = jax.jit(method.predict)(variables, images)
    teacher = extract(variables, images.images)
    for m in BOTH:
        student = imitate(variables, m, images.images[m], [x.shape[1:3] for x in teacher[m]])
        product = 1.0
        for t, b in zip(teacher[m], student, strict=True):
            distance = 1 - cosines(t, np.asarray(b, np.float64))
            product = product * jax.image.resize(distance, (2, 224, 224), "bilinear")
        np.testing.assert_allclose(errors.maps[m], product, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(errors.published, errors.maps["rgb"] + errors.maps["depth"], rtol=1e-6)


def test_the_score_averages_the_largest_values():
    maps = np.random.default_rng(0).normal(size=(2, 224, 224)).astype(np.float32)
    for top, count in ((100, 77), (1, 1), (65536, 224**2)):
        expected = np.sort(maps.reshape(2, -1))[:, -count:].mean(1)
        np.testing.assert_allclose(top_mean(jnp.asarray(maps), top), expected, rtol=1e-4, atol=1e-5)


def test_group_norm_has_no_statistics():
    method = build("destseg", make_config("depth", norm="group"))
    variables = jax.eval_shape(method.init, jax.random.key(0), batch(modalities=("depth",)))
    assert not jax.tree.leaves(variables["statistics"]["norms"])
    assert jax.tree.leaves(variables["params"])


MISTAKES = {
    "norm": ({"destseg.norm": "layer"}, r'config\.destseg\.norm is "layer"; use batch or group'),
    "map": ({"destseg.map": "both"}, r'config\.destseg\.map is "both"; use segmentation or distance'),
    "backbone": ({"backbone.name": "dinov2_vits14"}, r"config\.backbone\.name is dinov2_vits14, which has no features"),
    "grey levels": ({"input.depth_encoding": "xyz_uint8"}, r'config\.input\.depth_encoding is "xyz_uint8"'),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(changes, message):
    config = make_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        build("destseg", config)


def test_batch_norm_refuses_single_images(method, variables):
    config = make_config()
    config.train.batch_size = 1
    with pytest.raises(UserError, match=r"config\.train\.batch_size is 1, which destseg's batch norm"):
        check(config)
    config.destseg.norm = "group"
    check(config)
    with pytest.raises(UserError, match="a step has one training image"):
        jax.eval_shape(devices.on_one_device(method.loss), variables, shared(batch(1), 1, 0.0), KEYS[:1])


def test_modalities_that_are_judged_together_cannot_be_chosen_alone():
    config = make_config()
    config.combine = "rgb"
    with pytest.raises(UserError, match=r"config\.combine is rgb, but only rgb\+depth is judged"):
        make_rule(config)
    config.destseg.map = "distance"
    assert make_rule(config).combine == "rgb"
