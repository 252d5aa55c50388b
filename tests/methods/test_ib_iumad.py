"""IB-IUMAD as a whole: its losses, data flow and gradients.

tests/models tests the parts by themselves; here they serve as references.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from iumad_jax.config import paper
from iumad_jax.methods.ib_iumad import Network, bottleneck_loss, ib_iumad
from iumad_jax.methods.network import jitter
from iumad_jax.models.fusion import Fused, InformationBottleneckFusion
from iumad_jax.models.mamba import MambaDecoder
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.shapes import Batch
from tests.methods.reference import grown_variables, map_from

pytestmark = pytest.mark.slow

OBJECTS, GRID, CHANNELS, WIDTH = 3, 4, 6, 8
BOTH = ("rgb", "depth")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compile without optimisation. Each function runs only once here, so this takes a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(**changes):
    """Return a small `config.model` without randomness, with some changes."""
    model = paper("10-0").model
    model.update(width=WIDTH, heads=2, layers=1, hidden=12, patch_size=4, states=2, dropout=0.0)
    model.jitter.probability = 0.0
    model.update_from_flattened_dict(changes)
    return model


def random_batch(modalities=BOTH, images=2, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        {m: rng.normal(0, 2, (images, GRID**2, CHANNELS)).astype(np.float32) for m in modalities},
        {m: rng.integers(0, 256, (images, 16, 16, 3)).astype(np.float32) for m in modalities},
        np.arange(images, dtype=np.int32) % OBJECTS,
    )


def keys_for(batch, seed=0):
    return jax.random.split(jax.random.key(seed), len(batch.object_id))


def variables_for(config, modalities=BOTH):
    return grown_variables(ib_iumad(config, modalities), random_batch(modalities), OBJECTS)


def loss_of(config, modalities=BOTH):
    return jax.jit(ib_iumad(config, modalities).loss)


def predict_of(config, modalities=BOTH):
    return jax.jit(ib_iumad(config, modalities).predict)


@jax.jit
def branch(decoder_params, transformer_params, image, tokens):
    """Return the logits of the learned objects and the reconstruction for one modality of one image."""
    decoder = MambaDecoder(GRID, WIDTH, patch_size=4, blocks=1, states=2)
    condition, logits = decoder.apply({"params": decoder_params, "statistics": {"head": {"objects": OBJECTS}}}, image)
    transformer = ReconstructionTransformer(GRID, WIDTH, heads=2, layers=1, hidden=12)
    outputs = transformer.apply({"params": transformer_params}, tokens, condition, deterministic=True)
    return logits[:OBJECTS], outputs[-1]


@jax.jit
def fuse(params, reconstructions):
    """Fuse reconstructions, and return the logits of the learned objects."""
    fusion = InformationBottleneckFusion(params["expand"]["bias"].size, heads=2)
    statistics = {name: {"objects": OBJECTS} for name in ("fused_head", "compressed_head")}
    fused = fusion.apply({"params": params, "statistics": statistics}, *reconstructions, deterministic=True)
    return fused._replace(
        fused_logits=fused.fused_logits[:OBJECTS], compressed_logits=fused.compressed_logits[:OBJECTS]
    )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum())


# --- The losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modalities", "target", "compared"),
    [(("depth",), "both", ("depth",)), (BOTH, "rgb", ("rgb",)), (BOTH, "depth", ("depth",)), (BOTH, "both", BOTH)],
)
def test_losses_maps_and_logits(modalities, target, compared):
    config = tiny(
        target=target,
        fusion_weight=2.0,
        object_weight=3.0,
        ib_weight=5.0,
        ib_head_weight=7.0,
        aux_reconstruction_weight=11.0,
    )
    batch, variables = random_batch(modalities), variables_for(config, modalities)
    params = variables["params"]
    expected = {name: [] for name in ("fusion", "kl", "ib_heads")}
    expected |= {f"{term}_{m}": [] for m in modalities for term in ("object", "aux")}
    errors, object_logits = [], []
    for i, y in enumerate(batch.object_id):
        logits, reconstructions = {}, {}
        for m in modalities:
            logits[m], reconstructions[m] = branch(
                params[f"mamba_{m}"], params[f"reconstruction_{m}"], batch.images[m][i], batch.features[m][i]
            )
        fused, logits, reconstructions = jax.tree.map(
            np.asarray, (fuse(params["fusion"], list(reconstructions.values())), logits, reconstructions)
        )
        features = np.concatenate([batch.features[m][i] for m in compared], axis=1)
        error = fused.compressed - features
        p_fused, p_compressed = log_softmax(fused.fused_logits), log_softmax(fused.compressed_logits)
        expected["fusion"].append(2 * (error**2).mean())
        expected["kl"].append(5 * sum(np.exp(p_fused) * (p_fused - p_compressed)))
        expected["ib_heads"].append(5 * 7 * (-p_fused[y] - p_compressed[y]))
        for m in modalities:
            project = params[f"project_{m}"]
            rebuilt = reconstructions[m] @ project["kernel"] + project["bias"]
            expected[f"object_{m}"].append(3 * -log_softmax(logits[m])[y])
            expected[f"aux_{m}"].append(11 * ((rebuilt - batch.features[m][i]) ** 2).mean())
        errors.append(error)
        object_logits.append(sum(log_softmax(logits[m]) for m in modalities))
    expected = {name: np.mean(values) for name, values in expected.items()}

    total, terms, *_ = loss_of(config, modalities)(variables, batch, keys_for(batch))
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-3), name
    assert float(total) == pytest.approx(sum(expected.values()), rel=1e-3)

    prediction = predict_of(config, modalities)(variables, batch)
    np.testing.assert_allclose(prediction.published, map_from(np.linalg.norm(errors, axis=-1)), rtol=1e-3)
    assert set(prediction.maps) == set(compared)
    for m, parts in zip(compared, np.split(np.array(errors), len(compared), axis=-1), strict=True):
        np.testing.assert_allclose(prediction.maps[m], map_from(np.linalg.norm(parts, axis=-1)), rtol=1e-3)
    probabilities = np.asarray(nn.softmax(prediction.object_logits))
    np.testing.assert_allclose(probabilities[:, :OBJECTS], nn.softmax(np.array(object_logits)), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(probabilities[:, OBJECTS:], 0)


def test_kl_trains_the_compressed_head_only():
    """Its gradient is that of a cross-entropy with softmax(F_fu's logits) as soft labels."""
    a, b = np.array([1.0, -2.0, 0.5], np.float32), np.array([0.3, 0.1, -1.0], np.float32)

    def kl(a, b):
        return bottleneck_loss(Fused(jnp.zeros((1, 1)), jnp.zeros((1, 1)), a, b), 0, 1.0)["kl"]

    value, (slope_a, slope_b) = jax.value_and_grad(kl, argnums=(0, 1))(a, b)
    p, q = np.exp(log_softmax(a)), np.exp(log_softmax(b))
    assert float(value) == pytest.approx(sum(p * np.log(p / q)), rel=1e-5)
    np.testing.assert_array_equal(slope_a, 0)
    np.testing.assert_allclose(slope_b, q - p, rtol=1e-5)
    assert float(kl(a, a)) == pytest.approx(0, abs=1e-6)


def test_the_loss_of_an_image_does_not_depend_on_the_other_images():
    config = tiny(**{"dropout": 0.2, "jitter.probability": 0.5})
    batch, variables = random_batch(("rgb",), images=4), variables_for(config, ("rgb",))
    keys, loss = keys_for(batch), loss_of(config, ("rgb",))

    def loss_values(*images):
        chosen = np.array(images)
        return np.array(jax.tree.leaves(loss(variables, jax.tree.map(lambda x: x[chosen], batch), keys[chosen])[:2]))

    np.testing.assert_allclose(loss_values(0, 1) + loss_values(2, 3), loss_values(0, 3) + loss_values(2, 1), rtol=1e-4)
    assert (loss_values(0, 1) != loss_values(2, 3)).all()


# --- Jitter -------------------------------------------------------------------------------------------------------


def test_jitter_is_normal_in_proportion_to_each_token():
    tokens = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32) * np.arange(1, 65)[:, None]
    tokens = tokens.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    jittered = jax.vmap(lambda key: jitter(key, tokens, scale=20.0, probability=1.0))(keys)
    noise = np.asarray(jittered, np.float64) - tokens
    strength = np.sqrt((tokens.astype(np.float64) ** 2).sum(1)) / 32 * 20
    assert abs((noise / strength[:, None]).mean()) < 0.005
    np.testing.assert_allclose(noise.std((0, 2)), strength, rtol=0.05)


def test_jitter_has_the_probability_of_the_config():
    tokens = np.ones((4, 3), np.float32)

    def share(probability):
        keys = jax.random.split(jax.random.key(0), 1000)
        jittered = jax.vmap(lambda key: jitter(key, tokens, scale=20.0, probability=probability))(keys)
        changed = np.asarray(jittered) != tokens
        assert (changed.all((1, 2)) | ~changed.any((1, 2))).all()  # either all tokens of an image or none
        return changed.mean()

    assert (share(0.0), share(1.0)) == (0, 1)
    assert abs(share(0.3) - 0.3) < 0.05


def test_reconstruction_gets_jitter_in_training_only():
    """In training, the two transformers get independent noise; otherwise they get the unchanged features."""
    config = tiny(**{"jitter.probability": 1.0})
    batch, variables = random_batch(), variables_for(config)
    features = batch.features["rgb"][0]

    def transformer_inputs(deterministic):
        inputs = []

        def record(next_function, args, kwargs, context):
            if isinstance(context.module, ReconstructionTransformer) and context.method_name == "__call__":
                inputs.append(args[0])
            return next_function(*args, **kwargs)

        @jax.jit
        def run():
            with nn.intercept_methods(record):
                Network(config, BOTH).apply(
                    variables,
                    dict.fromkeys(BOTH, features),
                    {m: batch.images[m][0] for m in BOTH},
                    deterministic=deterministic,
                    rngs={"jitter": jax.random.key(1)},
                )
            return [jnp.asarray(tokens) for tokens in inputs]

        return [np.asarray(tokens) for tokens in run()]

    for tokens in transformer_inputs(deterministic=True):
        np.testing.assert_array_equal(tokens, features)
    strength = np.linalg.norm(features, axis=1, keepdims=True) / CHANNELS * 20
    noise = [(tokens - features) / strength for tokens in transformer_inputs(deterministic=False)]
    assert [np.std(modality_noise) for modality_noise in noise] == pytest.approx([1, 1], abs=0.2)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.3


def test_target_is_not_jittered():
    """A network of zeros outputs zeros, so its loss is the mean square of the target."""
    config = tiny(**{"jitter.probability": 1.0})
    batch = random_batch(("rgb",))
    zeros = jax.tree.map(np.zeros_like, variables_for(config, ("rgb",)))
    _, terms, *_ = loss_of(config, ("rgb",))(zeros, batch, keys_for(batch))
    assert float(terms["fusion"]) == pytest.approx(np.mean(batch.features["rgb"] ** 2), rel=1e-5)


# --- Data flow ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    """Return a function from the tokens and images of both modalities to the output of every part of the network."""
    variables = variables_for(tiny())

    @jax.jit
    def part_outputs(tokens, images):
        _, state = Network(tiny(), BOTH).apply(
            variables,
            tokens,
            images,
            deterministic=True,
            capture_intermediates=lambda module, _: len(module.path) == 1,
        )
        return {name: value["__call__"][0] for name, value in state["intermediates"].items()}

    return part_outputs


def equal(tree, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True))


def one_image(batch, i):
    return jax.tree.map(lambda x: x[i], (batch.features, batch.images))


def test_each_input_reaches_its_own_branch_and_the_fusion(parts):
    tokens, images = one_image(random_batch(), 0)
    other_tokens, other_images = one_image(random_batch(seed=1), 0)
    base = parts(tokens, images)
    assert set(base) == {"mamba_rgb", "mamba_depth", "reconstruction_rgb", "reconstruction_depth", "fusion"}
    for m in BOTH:
        by_image = parts(tokens, images | {m: other_images[m]})
        by_tokens = parts(tokens | {m: other_tokens[m]}, images)
        changed_by_image = {name for name in base if not equal(base[name], by_image[name])}
        changed_by_tokens = {name for name in base if not equal(base[name], by_tokens[name])}
        assert changed_by_image == {f"mamba_{m}", f"reconstruction_{m}", "fusion"}
        assert changed_by_tokens == {f"reconstruction_{m}", "fusion"}


def test_swapping_the_object_changes_the_condition(parts):
    batch = random_batch()
    (tokens, first_images), (_, second_images) = one_image(batch, 0), one_image(batch, 1)
    first, second = parts(tokens, first_images), parts(tokens, second_images)
    for m in BOTH:
        for condition, other in zip(first[f"mamba_{m}"][0], second[f"mamba_{m}"][0], strict=True):
            assert np.abs(condition - other).mean() > 0.1
        assert not equal(first[f"reconstruction_{m}"], second[f"reconstruction_{m}"])


@pytest.mark.parametrize("modality", BOTH)
def test_one_modality_has_one_branch_and_no_fusion(modality):
    params = variables_for(tiny(), (modality,))["params"]
    assert set(params) == {f"mamba_{modality}", f"reconstruction_{modality}", "fusion"}
    assert set(params["fusion"]) == {"fuse", "squeeze", "expand", "fused_head", "compressed_head"}


# --- Gradients ----------------------------------------------------------------------------------------------------


def gradients(config, modalities):
    """Return {path of a parameter: {loss term: largest absolute derivative}}."""
    batch, variables = random_batch(modalities), variables_for(config, modalities)
    loss = ib_iumad(config, modalities).loss

    @jax.jit
    def largest_derivatives(params):
        jacobian = jax.jacrev(lambda p: loss(variables | {"params": p}, batch, keys_for(batch)).terms)(params)
        return jax.tree.map(lambda derivative: jnp.abs(derivative).max(), jacobian)

    sizes = {}
    for term, tree in largest_derivatives(variables["params"]).items():
        for path, size in jax.tree.leaves_with_path(tree):
            sizes.setdefault("/".join(key.key for key in path), {})[term] = float(size)
    return sizes


@pytest.mark.parametrize(
    ("modalities", "layers", "detached"), [(("rgb",), 2, True), (("depth",), 1, False), (BOTH, 1, True)]
)
def test_gradients_reach_every_parameter_that_they_should(modalities, layers, detached):
    randomness = {"jitter.probability": 1.0, "dropout": 0.1}
    config = tiny(**randomness, layers=layers, aux_reconstruction_weight=1.0, detach_condition=detached)
    sizes = gradients(config, modalities)
    # The bias of attention's keys adds a constant to all weights of a query, which softmax ignores.
    ignored = {path for path in sizes if path.endswith("key/bias")}
    assert len(ignored) == len(modalities) * 3 * layers + (2 if len(modalities) == 2 else 0)
    for path, by_term in sizes.items():
        if path not in ignored:
            assert max(by_term.values()) > 1e-6, path
        part, *_ = path.split("/")
        moved_by = {term for term, size in by_term.items() if size > 0}
        if part.startswith("mamba"):  # trained by its cross-entropy alone if the condition is detached
            conditions = not detached and "/head" not in path
            assert moved_by == (set(by_term) if conditions else {part.replace("mamba", "object")}), path
        else:
            assert not any(term.startswith("object") for term in moved_by), path
        if "fused_head" in path:  # the target distribution of the compressed head
            assert moved_by == {"ib_heads"}, path


# --- Standardised features ----------------------------------------------------------------------------------------


def test_standardise_uses_the_base_steps_statistics():
    """Loss and map are those of z-scored features, both as input and as target."""
    config, modalities = tiny(standardise=True), ("rgb",)
    method = ib_iumad(config, modalities)
    first, second, later = (random_batch(modalities, images=3, seed=seed) for seed in range(3))
    variables = variables_for(config, modalities)
    params = variables["params"]
    for batch, step in [(first, 0), (second, 0), (later, 1)]:
        variables = method.observe(variables, batch, step)

    base = np.concatenate([first.features["rgb"], second.features["rgb"]])
    z_scored = (later.features["rgb"] - base.mean((0, 1))) / base.std((0, 1))
    errors = []
    for image, tokens in zip(later.images["rgb"], z_scored, strict=True):
        _, reconstruction = branch(params["mamba_rgb"], params["reconstruction_rgb"], image, tokens)
        errors.append(np.asarray(fuse(params["fusion"], [reconstruction]).compressed) - tokens)
    actual = predict_of(config, modalities)(variables, later).maps["rgb"]
    np.testing.assert_allclose(actual, map_from(np.linalg.norm(errors, axis=-1)), rtol=1e-3)
    _, terms, *_ = loss_of(config, modalities)(variables, later, keys_for(later))
    assert float(terms["fusion"]) == pytest.approx(np.square(errors).mean(), rel=1e-3)


def test_without_standardise_nothing_is_observed():
    method, batch = ib_iumad(tiny(), BOTH), random_batch()
    variables = {"params": {}, "statistics": {}}
    assert method.observe(variables, batch, 0) == variables
