"""The frozen backbones compared with their PyTorch reference packages, and layers with independent computations.

The golden values come from the reference packages. To write them again, with torch and both packages installed:
`python tests/models/test_efficientnet.py`.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import lax

from iumad_jax.models import pretrained
from iumad_jax.models.backbone import FeatureExtractor
from iumad_jax.models.efficientnet import EfficientNet
from iumad_jax.models.layers import DepthwiseConv, depthwise_conv, resize_aligned
from tests.models.seeded import sample, seeded_images, seeded_state

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).with_name("efficientnet_goldens.json")
CASES = [  # 75 is odd at every stride
    ("efficientnet_lite0", 96),
    ("efficientnet_lite0", 75),
    ("efficientnet_lite1", 75),
    ("efficientnet_lite2", 75),
    ("efficientnet_b4", 96),
    ("efficientnet_b4", 75),
]
ENDPOINTS = {  # numbers of blocks in the reference packages
    "efficientnet_lite0": (0, 2, 4, 10),
    "efficientnet_lite1": (0, 3, 6, 14),
    "efficientnet_lite2": (0, 3, 6, 14),
    "efficientnet_b4": (1, 5, 9, 21),
}
CHANNELS = pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("efficientnet_lite0", 192),
        ("efficientnet_lite1", 192),
        ("efficientnet_lite2", 208),
        ("efficientnet_b4", 272),
    ],
)


def normalised(backbone: str, images: np.ndarray) -> np.ndarray:
    if "lite" in backbone:
        return (images - 127) / np.float32(128)
    return ((images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)


def reference_endpoints(backbone: str, images: np.ndarray) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Return channels-last endpoints of the reference package for images (0..255), and its state dict."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normalised(backbone, images).transpose(0, 3, 1, 2).copy())
    lite = "lite" in backbone
    module = pytest.importorskip("efficientnet_lite_pytorch" if lite else "efficientnet_pytorch")
    model = module.EfficientNet.from_name(backbone.replace("_", "-")).eval()
    if backbone == "efficientnet_lite0":
        package = pretrained.PACKAGES[backbone]
        model.load_state_dict(torch.load(pretrained.metadata.distribution(package.name).locate_file(package.file)))
    else:
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict({name: torch.from_numpy(value) for name, value in seeded_state(shapes).items()})
    with torch.no_grad():
        outputs = []
        y = model._swish(model._bn0(model._conv_stem(x)))
        for block in model._blocks:
            y = block(y)
            outputs.append(y.numpy().transpose(0, 2, 3, 1))
    return [outputs[i] for i in ENDPOINTS[backbone]], model.state_dict()


def resize_by_hand(x: np.ndarray, size: int) -> np.ndarray:
    """Apply np.interp along rows, then along columns, in float64."""
    for axis in (1, 2):
        n = x.shape[axis]
        points = np.linspace(0, n - 1, size)
        x = np.apply_along_axis(
            lambda line, points=points, n=n: np.interp(points, np.arange(n), line), axis, x.astype(np.float64)
        )
    return x


@pytest.fixture(scope="module")
def goldens() -> dict:
    return json.loads(GOLDENS.read_text())


@pytest.fixture(scope="module")
def variables(goldens, tmp_path_factory) -> dict:
    """Return the variables by backbone; all but those of Lite0 are loaded from .safetensors files."""
    loaded = {"efficientnet_lite0": pretrained.load("efficientnet_lite0")}
    for backbone in ENDPOINTS.keys() - loaded:
        path = tmp_path_factory.mktemp("weights") / "seeded.safetensors"
        safetensors.numpy.save_file(seeded_state(goldens[backbone]["shapes"]), path)
        loaded[backbone] = pretrained.load(backbone, str(path))
        path.unlink()
    return loaded


@pytest.fixture(scope="module")
def ours(variables) -> Callable[[str, int], tuple[np.ndarray, list[np.ndarray]]]:
    """Return a function (backbone, size) -> features on a 14 x 14 grid and endpoints of the seeded images."""

    @cache
    def compute(backbone: str, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
        keep = {"capture_intermediates": lambda module, _: isinstance(module, EfficientNet), "mutable": "intermediates"}
        apply = jax.jit(partial(FeatureExtractor(backbone, 14).apply, **keep))
        features, kept = apply(variables[backbone], seeded_images(size))
        return np.asarray(features), [np.asarray(x) for x in kept["intermediates"]["backbone"]["__call__"][0]]

    return compute


@pytest.mark.parametrize(("backbone", "size"), CASES)
def test_endpoints_equal_stored_values_of_the_reference_package(goldens, ours, backbone, size):
    _, endpoints = ours(backbone, size)
    golden = goldens[backbone][str(size)]
    assert [list(x.shape) for x in endpoints] == golden["shapes"]
    for x, values in zip(endpoints, golden["values"], strict=True):
        np.testing.assert_allclose(sample(x), values, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(("backbone", "size"), CASES)
def test_endpoints_equal_the_reference_package(ours, backbone, size):
    theirs, _ = reference_endpoints(backbone, seeded_images(size))
    for x, y in zip(ours(backbone, size)[1], theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-6)


@CHANNELS
def test_features_are_the_endpoints_on_one_grid(ours, backbone, channels):
    features, endpoints = ours(backbone, 75)
    assert features.shape == (2, 14, 14, channels)
    expected = np.concatenate([resize_by_hand(x, 14) for x in endpoints], axis=-1)
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_saved_by_torch_give_the_same_features(variables, tmp_path, zipped):
    torch = pytest.importorskip("torch")
    _, state = reference_endpoints("efficientnet_b4", seeded_images(32))
    torch.save(state, tmp_path / "b4.pth", _use_new_zipfile_serialization=zipped)
    loaded = pretrained.load("efficientnet_b4", str(tmp_path / "b4.pth"))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables["efficientnet_b4"])


@CHANNELS
@pytest.mark.parametrize(("size", "grid"), [(224, 14), (448, 28)])
def test_feature_shapes_for_the_papers_size_and_twice_that_size(backbone, channels, size, grid):
    images = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
    features, _ = jax.eval_shape(FeatureExtractor(backbone, grid).init_with_output, jax.random.key(0), images)
    assert features.shape == (3, grid, grid, channels)


@pytest.mark.parametrize(("h", "w", "size"), [(14, 14, 224), (9, 6, 5), (1, 7, 3), (23, 23, 14)])
def test_resize_interpolates_with_aligned_corners(h, w, size):
    x = np.random.default_rng(0).standard_normal((2, h, w, 3)).astype(np.float32)
    y = resize_aligned(jnp.asarray(x), size)
    np.testing.assert_allclose(y, resize_by_hand(x, size), atol=1e-5)
    np.testing.assert_array_equal(y[:, [0, 0, -1, -1], [0, -1, 0, -1]], x[:, [0, 0, -1, -1], [0, -1, 0, -1]])


def test_resize_to_the_same_size_changes_nothing_and_any_leading_axes_are_allowed():
    x = jnp.arange(2 * 3 * 5 * 5 * 2.0).reshape(2, 3, 5, 5, 2)
    np.testing.assert_array_equal(resize_aligned(x, 5), x)
    np.testing.assert_array_equal(resize_aligned(x[0, 0], 9), resize_aligned(x, 9)[0, 0])
    np.testing.assert_array_equal(resize_aligned(x, 1), x[:, :, :1, :1])


def grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Compute a depthwise convolution with XLA's grouped convolution."""
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (11, 6)])
def test_depthwise_convolution_and_its_gradients(size, stride, h, w):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, h, w, 4)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 4)), jnp.float32)
    expected, expected_vjp = jax.vjp(lambda x, k: grouped(x, k, stride), x, kernel)
    actual, vjp = jax.vjp(lambda x, k: depthwise_conv(x, k, stride), x, kernel)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    g = jnp.asarray(rng.standard_normal(expected.shape), jnp.float32)
    for ours, theirs in zip(vjp(g), expected_vjp(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_depthwise_layer_keeps_the_size_and_maps_over_images():
    layer = DepthwiseConv()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 7, 4)), jnp.float32)
    variables = layer.init(jax.random.key(0), x[0])
    shifted = {"params": {**variables["params"], "bias": jnp.arange(4.0)}}
    y = layer.apply(shifted, x)
    assert y.shape == x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = grouped(padded, variables["params"]["kernel"], 1) + jnp.arange(4.0).reshape(1, 1, 1, 4)
    np.testing.assert_allclose(y, expected, atol=1e-5)

    def loss(variables, x):
        return jnp.sum(lax.square(layer.apply(variables, x)))

    together = jax.grad(loss)(shifted, x)
    apart = jax.grad(lambda v, x: jax.vmap(loss, (None, 0))(v, x).sum())(shifted, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), together, apart)


if __name__ == "__main__":
    stored: dict = {backbone: {} for backbone in ENDPOINTS}
    for backbone, size in CASES:
        endpoints, state = reference_endpoints(backbone, seeded_images(size))
        values = [[round(float(v), 6) for v in sample(x)] for x in endpoints]
        stored[backbone][str(size)] = {"shapes": [list(x.shape) for x in endpoints], "values": values}
        if backbone != "efficientnet_lite0":
            stored[backbone]["shapes"] = {name: list(value.shape) for name, value in state.items()}
    GOLDENS.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
