"""Training of DeSTSeg: its phases under every strategy, devices, photographs of textures, and that it finds defects."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from iumad_jax import continual
from iumad_jax.data.batches import single_update, training_input
from iumad_jax.errors import UserError
from iumad_jax.methods import build
from iumad_jax.metrics import image_auroc
from iumad_jax.runtime import devices
from iumad_jax.synthetic import make_defects
from iumad_jax.training.epochs import train_epochs
from iumad_jax.training.optimization import learning_rates
from iumad_jax.training.update import initial_state, make_update
from tests.methods.test_destseg import IMAGES, KEYS, batch, make_config, shared, variables_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def of_depth(fast_compilation):
    """Return the method of depth alone, and its variables."""
    method = build("destseg", make_config("depth"))
    return method, variables_of(method, batch(modalities=("depth",)))


def parts(tree):
    """Divide a tree by the top-level names of the networks into that of the students and that of the segmentation."""
    student = {name: part for name, part in tree.items() if name.startswith("student")}
    return student, {name: part for name, part in tree.items() if name not in student}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def momenta(state):
    """Return the momenta of the students and of the segmentation network."""
    inner = {name: jax.tree.leaves(s.inner_state.inner_state) for name, s in state.optimizer.inner_states.items()}
    return inner["student"], [*inner["residual"], *inner["head"]]


@pytest.mark.parametrize("strategy", ["finetune", "iuf", "replay"])
def test_what_a_phase_does_not_train_stays_to_the_bit(of_depth, strategy):
    """In a later step, where iuf pulls weights back and replay adds images; on four devices."""
    config = make_config("depth", strategy)
    method, variables = of_depth
    active = continual.build(config, method)
    optimizer = method.optimizer(config.train)
    images = batch(modalities=("depth",))
    within = active.begin({}, variables, jax.tree.map(lambda array: array[:1], images), 0)
    between = active.finish(within, variables, images, 0)
    within = active.begin(between, variables, jax.tree.map(lambda array: array[:1], images), 1)
    update = make_update(method, optimizer, active)
    state = devices.replicate(initial_state(variables, optimizer, 0, [], within))
    states = [devices.unreplicate(state)]
    rates = np.float32([config.train.learning_rate])
    for progress in (0.0, 0.1, 0.3, 0.6):
        inputs = single_update(images)
        inputs = inputs._replace(progress=np.full((len(inputs.indices), 1), progress, np.float32))
        state, scalars = update(state, inputs, jax.random.key(1), rates)
        copies = jax.tree.map(np.asarray, (state.variables["params"], state.variables["statistics"]))
        assert jax.tree.all(jax.tree.map(lambda x: np.array_equal(x, np.broadcast_to(x[:1], x.shape)), copies))
        states.append(devices.unreplicate(state))
        assert (scalars["l1"][0] > 0) == (progress >= 0.2)
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        trained, idle = (0, 1) if number < 2 else (1, 0)
        pairs = [
            (parts(s.variables["params"]), parts(s.variables["statistics"]["norms"]), momenta(s))
            for s in (before, after)
        ]
        for old, new in zip(*pairs, strict=True):
            assert same(old[idle], new[idle])
            assert not same(old[trained], new[trained])
    assert same(states[0].variables["frozen"], states[-1].variables["frozen"])
    assert same(states[0].variables["statistics"]["teacher"], states[-1].variables["statistics"]["teacher"])
    if strategy == "iuf":  # updates are projected, and the layers that are watched exist
        assert {"student_depth", "head"} == set(within["projections"])


def test_the_loss_does_not_depend_on_how_devices_share_the_batch(of_depth):
    """Nor do its gradient and the running statistics; of three images on two devices, one is repeated."""
    (method, variables), images, count = of_depth, 3, 2
    data = batch(images, 5, ("depth",))

    @jax.jit
    def on_devices(params, divided, keys):
        run = jax.vmap(functools.partial(method.loss, variables | {"params": params}), axis_name=devices.AXIS)
        result = run(divided, keys)
        return result.total.mean(), (result.terms, result.statistics)

    def compute(progress, devices):
        divided = shared(data, devices, progress)
        keys = jax.random.split(jax.random.key(8), divided.object_id.size).at[:images].set(KEYS[:images])
        gradient = jax.value_and_grad(on_devices, has_aux=True)
        return gradient(variables["params"], divided, keys.reshape(divided.object_id.shape))

    for progress in (0.0, 0.5):
        ((total, (terms, statistics)), gradient), ((one, (one_terms, expected)), one_gradient) = (
            compute(progress, n) for n in (count, 1)
        )
        np.testing.assert_allclose(total, one, rtol=1e-3)
        for name, term in terms.items():
            np.testing.assert_allclose(term.mean(), one_terms[name].mean(), rtol=1e-3, err_msg=name)
        for a, b in zip(jax.tree.leaves(statistics), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), rtol=2e-3, atol=2e-3)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one_gradient))
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(one_gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3 * largest)


def test_a_resumed_step_ends_to_the_bit_like_one_that_was_not_interrupted(of_depth):
    """It is interrupted in the second phase, after five of eight updates."""
    method, variables = of_depth
    config = make_config("depth").train
    config.epochs = 4
    optimizer = method.optimizer(config)
    update, data = make_update(method, optimizer), batch(8, modalities=("depth",))

    def train(variables, first, leaves):
        state = initial_state(variables, optimizer, first, leaves)
        stream = training_input([data], 4, 7, first)
        rates = learning_rates(config, updates_per_epoch=2)
        return list(train_epochs(update, state, stream, rates, jax.random.key(2), 2, config.epochs))

    whole = train(variables, 0, [])
    half = whole[1].state
    resumed = train(half.variables, 4, jax.tree.leaves(half.optimizer))
    jax.tree.map(np.testing.assert_array_equal, resumed[-1].state, whole[-1].state)
    assert not same(half.variables["params"], whole[-1].state.variables["params"])


def test_it_learns_to_find_fresh_defects(fast_compilation):
    """In eight images, by the segmentation and, less sharply, by the distance of the student from the teacher.

    Without the first phase, which alone trains the student, that distance would tell as little as at the start.
    """
    config = make_config("rgb", student_width=8, segmentation_width=16, first_phase=0.25)
    config.backbone.weights = ""
    method = build("destseg", config)
    images = smooth_images(8)
    variables = variables_of(method, images)
    optimizer, updates = method.optimizer(config.train), 400
    jax.config.update("jax_disable_most_optimizations", False)  # so many updates take longer than compilation
    update = make_update(method, optimizer)
    state = devices.replicate(initial_state(variables, optimizer, 0, []))
    for number in range(updates):
        inputs = single_update(images)
        inputs = inputs._replace(progress=np.full((len(inputs.indices), 1), number / updates, np.float32))
        state, _ = update(state, inputs, jax.random.key(1), np.float32([config.train.learning_rate]))
    jax.config.update("jax_disable_most_optimizations", True)
    trained = devices.unreplicate(state).variables
    keys = jax.random.split(jax.random.key(99), 8)
    fresh = make_defects(keys, images.images, None, "normals", False)
    masks = np.asarray(jax.image.resize(fresh.mask.astype(np.float32), (8, 224, 224), "nearest") > 0.5).ravel()

    def auroc(variables, **keys):
        judge = build("destseg", make_config("rgb", student_width=8, segmentation_width=16, **keys))
        maps = jax.jit(judge.predict)(variables, images._replace(images=fresh.images)).published
        return image_auroc(masks, np.ravel(maps))

    assert auroc(trained) > 0.85
    assert auroc(trained, map="distance") > 0.6
    assert auroc(variables) < 0.7
    assert auroc(variables, map="distance") < 0.5


def smooth_images(count):
    """Return blurred noise of 64 pixels."""
    noise = np.random.default_rng(0).normal(size=(count, 8, 8, 3)).astype(np.float32)
    smooth = jax.image.resize(noise, (count, 64, 64, 3), "cubic")
    images = batch(count, modalities=("rgb",))
    return images._replace(images={"rgb": np.asarray(jnp.clip(128 + 50 * smooth, 0, 255))}, foreground=None)


@pytest.fixture
def textures(tmp_path):
    """Create a folder with textures of one grey each, in folders of kinds as in DTD."""
    for number in range(6):
        folder = tmp_path / "dtd" / f"kind{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 14), (40 * number,) * 3).save(folder / f"{number}.png")
    return tmp_path / "dtd"


def test_photographs_of_textures_are_chosen_by_step_and_dropped_after_it(textures):
    method = build("destseg", make_config("rgb", textures=str(textures), standardise=False))
    images = batch(modalities=("rgb",))
    variables = {"statistics": {"norms": {}, "teacher": {}}}
    first, again = (method.observe(variables, images, 0)["statistics"]["photographs"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first.dtype, first.shape) == (np.uint8, (6, 32, 32, 3))
    assert sorted(first[:, 0, 0, 0]) == [0, 40, 80, 120, 160, 200]
    observed = method.observe(variables, images, 0)
    assert "photographs" not in method.fit(observed, images, 0, False)["statistics"]
    pasted = make_defects(KEYS, {"rgb": jnp.full((IMAGES, 32, 32, 3), 250.0)}, None, "", False, None, first)
    for image, mask in zip(np.asarray(pasted.images["rgb"]), np.asarray(pasted.mask), strict=True):
        assert (image[~mask] == 250).all()
        assert not mask.any() or (np.ptp(image[mask]) < 1e-3 and image[mask].max() < 250)


def test_a_folder_without_textures_and_damaged_ones_are_told(tmp_path):
    method = build("destseg", make_config("rgb", textures=str(tmp_path), standardise=False))
    images, variables = batch(modalities=("rgb",)), {"statistics": {"norms": {}, "teacher": {}}}
    with pytest.raises(UserError, match=r"config\.destseg\.textures is .*, where no \.jpg, \.jpeg or \.png is"):
        method.observe(variables, images, 0)
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"the texture .*damaged\.jpg cannot be read"):
        method.observe(variables, images, 0)
