"""Networks of latent diffusion compared with torch, diffusers and transformers: see tests/oracle/make.py.

Stored outputs are compared always, and those computed anew where the packages are installed.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from iumad_jax.models import stable_diffusion
from iumad_jax.models.autoencoder_kl import AutoencoderKL
from iumad_jax.models.diffusion import (
    AnomalyMasked,
    Guidance,
    PixelHint,
    SemanticGuide,
    Sizes,
    UNet,
    add_noise,
    ddim,
    sampling_levels,
    target,
)
from iumad_jax.models.text_encoder import EMPTY_PROMPT, TextEncoder
from tests.oracle import inputs
from tests.oracle.inputs import CHANNELS, CONTEXT, GROUPS, HEADS, HINT, LEVELS, normal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]

GOLDENS = Path(__file__).parents[1] / "oracle" / "goldens.npz"
SIZES = Sizes(CHANNELS, heads=HEADS, groups=GROUPS)
AUTOENCODER = AutoencoderKL(CHANNELS, groups=GROUPS)


def oracles(case):
    """Return the outputs of a case that are stored, and those computed anew if that is possible."""
    with np.load(GOLDENS) as stored:
        yield {name.removeprefix(f"{case}/"): stored[name] for name in stored if name.startswith(f"{case}/")}
    if importlib.util.find_spec("diffusers"):
        from tests.oracle import make

        yield make.compute(case)


def check(case, outputs, only=""):
    """Compare with the outputs whose names contain `only`, to 3e-5 of the largest value."""
    for oracle in oracles(case):
        expected = {name: value for name, value in oracle.items() if only in name}
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value, atol=3e-5 * np.abs(value).max(), rtol=0, err_msg=name)


def seeded(module, *given):
    """Give all parameters the values that depend on their names in diffusers."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    hint = {"hint": "controlnet_cond_embedding"}
    named = {
        ".".join(hint.get(part, part) for part in name.split(".")): tensor
        for name, tensor in stable_diffusion.tensors(shapes).items()
    }
    state = inputs.state_dict({name: tensor.shape for name, tensor in named.items()})
    return unflatten_dict(
        {t.path: ours(state[name]) if t.path[-1] == "kernel" else state[name] for name, t in named.items()}
    )


def ours(kernel):
    """Convert a kernel to our layout."""
    return kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T


@pytest.fixture(scope="module")
def autoencoder_params():
    return seeded(AUTOENCODER, jnp.zeros((64, 64, 3)))


@pytest.fixture(scope="module")
def unet_params(compile_quickly):
    return seeded(UNet(SIZES), jnp.zeros((16, 16, 4)), 0, jnp.zeros(CONTEXT))


def test_autoencoder(autoencoder_params):
    encode, decode = (
        jax.jit(lambda x, method=method: AUTOENCODER.apply({"params": autoencoder_params}, x, method=method))
        for method in ("encode", "decode")
    )
    outputs = {}
    for rows, columns in inputs.AUTOENCODER_SIZES:
        size = f"{rows}x{columns}"
        outputs[f"mean {size}"], outputs[f"log-variance {size}"] = encode(normal("image", rows, columns, 3))
        outputs[f"decoded {size}"] = decode(normal("latent", rows // 8, columns // 8, 4))
    check("autoencoder", outputs)


def test_unet(unet_params):
    context = normal("context", *CONTEXT)
    predict = jax.vmap(lambda z, level: UNet(SIZES).apply({"params": unet_params}, z, level, context), (None, 0))
    run = jax.jit(predict)
    outputs = {}
    for size in inputs.LATENT_SIZES:
        predicted = run(normal("latent", size, size, 4), np.array(LEVELS))
        outputs |= {f"{size} {level}": x for level, x in zip(LEVELS, predicted, strict=True)}
    check("unet", outputs)


def test_unet_without_context():
    unet = UNet(Sizes((8, 16, 16), blocks=1, attending=(1, 2), heads=HEADS, groups=GROUPS))
    z = normal("latent", 14, 14, 4)
    params = seeded(unet, z, 0)
    predicted = jax.jit(jax.vmap(lambda level: unet.apply({"params": params}, z, level)))(np.array(LEVELS))
    check("unet_without_context", dict(zip(map(str, LEVELS), predicted, strict=True)))


@pytest.mark.parametrize("fuse", [True, False])
def test_unet_with_semantic_guide(unet_params, fuse):
    guide = SemanticGuide(SIZES, PixelHint(CHANNELS[0], zero=True, widths=HINT), fuse)
    given = normal("latent", 16, 16, 4), LEVELS[1], normal("context", *CONTEXT)
    params = seeded(guide, *given, normal("hint", 128, 128, 3))

    @jax.jit
    def run(z, level, context, image):
        guidance = guide.apply({"params": params}, z, level, context, image)
        return guidance, UNet(SIZES).apply({"params": unet_params}, z, level, context, guidance)

    guidance, noise = run(*given, normal("hint", 128, 128, 3))
    assert guidance.start is None
    outputs = {f"noise {fuse}": noise, f"middle {fuse}": guidance.middle}
    outputs |= {f"coarsest {k} {fuse}": x for k, x in enumerate(guidance.coarsest)}
    check("diad", outputs, only=f" {fuse}")


def amn_params():
    """Return the parameters of the anomaly-masked network, whose attention splits kernels by heads."""
    params, d = {}, CHANNELS[0]
    for name, value in inputs.amn_state().items():
        first, *rest, part = name.split(".")
        leaf = "bias" if part == "bias" else "scale" if rest[-1].startswith("norm") else "kernel"
        if first == "hint":
            params["hint", "_".join(rest), leaf] = ours(value)
        elif rest[0].startswith("norm"):
            params[f"encoder_{first}_norm_{rest[0][-1]}", leaf] = value
        elif rest[0] in ("hidden", "output"):
            params[f"encoder_{first}_feed_forward", rest[0], leaf] = value.T
        else:
            split = (HEADS, d // HEADS)
            shape = split if leaf == "bias" else (*split, d) if rest[0] == "out" else (d, *split)
            shape = (d,) if (rest[0], leaf) == ("out", "bias") else shape
            params[f"encoder_{first}_attention", rest[0], leaf] = value.T.reshape(shape)
    return unflatten_dict(params)


def test_unet_with_anomaly_masked_network(unet_params):
    hint = PixelHint(CHANNELS[0], zero=False, bias=False, widths=HINT)
    network = AnomalyMasked(
        hint, inputs.AMN_LAYERS, HEADS, inputs.AMN_HIDDEN, neighbourhood=inputs.NEIGHBOURHOOD, dropout=0.5
    )

    @jax.jit
    def run(image, z):
        added, embedded = network.apply({"params": amn_params()}, image, deterministic=True)
        noise = UNet(SIZES).apply(
            {"params": unet_params}, z, LEVELS[1], normal("context", *CONTEXT), Guidance(start=added)
        )
        return {"embedded": embedded, "added": added, "noise": noise}

    check("cdad", run(normal("masked", 64, 64, 3), normal("latent", 8, 8, 4)))


def test_sampling():
    clean, noise = normal("clean", 4, 4, 2), normal("noise", 4, 4, 2)
    levels = sampling_levels(10, 999)
    outputs = {"v": target(clean, noise, 501, "v")}
    for kind, theirs in (("noise", "epsilon"), ("v", "v_prediction")):
        result, received = ddim(lambda z, level: jnp.tanh(z) + level / 1000, add_noise(clean, noise, 999), levels, kind)
        outputs |= {f"levels {theirs}": levels, f"result {theirs}": result, f"received {theirs}": received}
    check("sampling", outputs)


def test_empty_prompt():
    text_encoder = TextEncoder(**inputs.TEXT)
    params = seeded(text_encoder, EMPTY_PROMPT)
    context = jax.jit(text_encoder.apply)({"params": params}, EMPTY_PROMPT)
    check("text_encoder", {"context": context})


def test_log_variance_is_clipped(autoencoder_params):
    kernel = autoencoder_params["quant_conv"]["kernel"]
    params = autoencoder_params | {"quant_conv": {"kernel": 1e3 * kernel, "bias": np.zeros(8, np.float32)}}
    mean, log_variance = AUTOENCODER.apply({"params": params}, normal("image", 32, 32, 3), method="encode")
    assert (log_variance.min(), log_variance.max()) == (-30, 20)
    assert np.abs(mean).max() > 100
