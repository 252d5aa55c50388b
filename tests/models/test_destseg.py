"""Networks of DeSTSeg compared with a definition in PyTorch, and their layers with independent computations.

The golden values come from PyTorch. To write them again, with torch installed: `python -m tests.models.test_destseg`.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import stats

from iumad_jax.models.destseg import (
    AllImages,
    Block,
    Head,
    Norm,
    Residual,
    Student,
    conv,
    dilated_conv,
    distances,
    focal_loss,
    products,
    resize,
    unit,
)
from tests.models.seeded import sample, seeded_state

pytestmark = pytest.mark.usefixtures("compile_quickly")

GOLDENS = Path(__file__).with_name("destseg_goldens.json")
IMAGES, SIZE, WIDTH, CHANNELS = 3, 48, 4, (5, 6, 7)
SIZES = [(12, 12), (6, 6), (3, 3)]
STUDENT, RESIDUAL, HEAD = Student(WIDTH, "batch", CHANNELS), Residual(8, "batch"), Head(8, "batch")
RNG = np.random.default_rng(0)
PHOTOGRAPHS = RNG.normal(size=(IMAGES, SIZE, SIZE, 3)).astype(np.float32)
TEACHER = [RNG.normal(size=(IMAGES, *size, c)).astype(np.float32) for size, c in zip(SIZES, CHANNELS, strict=True)]


def together(count=IMAGES):
    """Return the images of one device."""
    return AllImages(lambda values: values.mean(0), count)


def shapes(module, *inputs):
    return jax.eval_shape(lambda key: module.init(key, *inputs, None), jax.random.key(0))


def seeded(prefix, module, *inputs):
    """Draw parameters and running statistics of a module; scales and variances are near 1."""
    flat = flatten_dict(shapes(module, *inputs), sep="/")
    names = {name: f"{prefix}/{name}".replace("scale", "norm.weight") for name in flat}
    names = {name: n.replace("variance", "running_var") for name, n in names.items()}
    torch_shapes = {names[name]: leaf.shape[::-1] for name, leaf in flat.items()}  # the outputs first
    state = seeded_state(torch_shapes)
    values = {name: state[names[name]].T for name in flat}
    return unflatten_dict(values, sep="/")


def networks():
    """Return the variables of student, residual blocks and head."""
    return {
        "student": seeded("student", STUDENT, PHOTOGRAPHS, SIZES),
        "residual": seeded("residual", RESIDUAL, np.zeros((1, 12, 12, sum(CHANNELS)), np.float32)),
        "head": seeded("head", HEAD, np.zeros((1, 12, 12, 8), np.float32)),
    }


def run(training):
    """Return the outputs of all networks by name, and their statistics after them."""

    @jax.jit
    def both(variables):
        averaging, changed = together() if training else None, {}
        x, changed["student"] = STUDENT.apply(variables["student"], PHOTOGRAPHS, SIZES, averaging, mutable="statistics")
        outputs = dict(zip(("b1", "b2", "b3"), x, strict=True))
        x, changed["residual"] = RESIDUAL.apply(
            variables["residual"], products(TEACHER, x), averaging, mutable="statistics"
        )
        outputs["logits"], changed["head"] = HEAD.apply(variables["head"], x, averaging, mutable="statistics")
        return outputs, changed

    outputs, changed = both(networks())
    return {name: np.asarray(x) for name, x in outputs.items()}, flatten_dict(changed, sep="/")


class Torch:
    """The networks in PyTorch, with the same variables."""

    def __init__(self, training):
        self.torch = pytest.importorskip("torch")
        self.functional = self.torch.nn.functional
        self.training = training
        flat = flatten_dict(networks(), sep="/")
        self.state = {name: self.torch.from_numpy(np.array(value)) for name, value in flat.items()}

    def array(self, network, collection, *path):
        return self.state["/".join((network, collection, *path))]

    def conv(self, x, network, name, stride=1, dilation=1):
        kernel = self.array(network, "params", *name.split("/"), "kernel").permute(3, 2, 0, 1)
        padding = dilation * (kernel.shape[-1] // 2)
        return self.functional.conv2d(x, kernel, stride=stride, padding=padding, dilation=dilation)

    def norm(self, x, network, name):
        path = name.split("/")
        weight, bias = (self.array(network, "params", *path, part) for part in ("scale", "bias"))
        mean, variance = (self.array(network, "statistics", *path, part) for part in ("mean", "variance"))
        return self.functional.batch_norm(x, mean, variance, weight, bias, self.training, 0.1, 1e-5)

    def block(self, x, network, name, stride=1):
        y = self.functional.relu(self.norm(self.conv(x, network, f"{name}/conv1", stride), network, f"{name}/norm1"))
        y = self.norm(self.conv(y, network, f"{name}/conv2"), network, f"{name}/norm2")
        if y.shape != x.shape:
            x = self.norm(self.conv(x, network, f"{name}/shortcut", stride), network, f"{name}/shortcut_norm")
        return self.functional.relu(x + y)

    def dense(self, x, network, name):
        kernel, bias = (self.array(network, "params", name, part) for part in ("kernel", "bias"))
        return self.torch.einsum("bchw,cd->bdhw", x, kernel) + bias[None, :, None, None]

    def resize(self, x, size):
        return self.functional.interpolate(x, size, mode="bilinear", align_corners=False)

    def student(self):
        network = "student"
        x = self.torch.from_numpy(PHOTOGRAPHS.transpose(0, 3, 1, 2).copy())
        x = self.functional.relu(self.norm(self.conv(x, network, "stem", 2), network, "stem_norm"))
        x = self.functional.max_pool2d(x, 3, 2, 1)
        for layer in range(4):
            for number in range(2):
                x = self.block(x, network, f"encoder{layer + 1}_{number}", 2 if layer and not number else 1)
        outputs = {}
        for stage in (4, 3, 2, 1):
            if stage < 4:
                x = self.resize(x, SIZES[stage - 1])
            x = self.block(self.block(x, network, f"decoder{stage}_0"), network, f"decoder{stage}_1")
            if stage < 4:
                outputs[f"b{stage}"] = self.dense(x, network, f"project{stage}")
        return outputs

    def segmentation(self, student):
        normalize, levels = self.functional.normalize, []
        for i, teacher in enumerate(TEACHER, 1):
            t = self.torch.from_numpy(teacher.transpose(0, 3, 1, 2).copy())
            levels.append(self.resize(-normalize(t) * normalize(student[f"b{i}"]), SIZES[0]))
        x = self.torch.cat(levels, 1)
        x = self.block(self.block(x, "residual", "block0"), "residual", "block1")

        def conv(x, name, dilation=1):
            return self.functional.relu(self.norm(self.conv(x, "head", name, 1, dilation), "head", f"{name}_norm"))

        pooled = conv(x.mean((2, 3), keepdim=True), "pooled").expand(-1, -1, *SIZES[0])
        x = self.torch.cat([pooled, *(conv(x, f"dilated{d}", d) for d in (6, 12, 18))], 1)
        return self.dense(conv(conv(x, "joined"), "conv"), "head", "classifier")[:, 0]

    def run(self):
        with self.torch.no_grad():
            outputs = self.student()
            logits = self.segmentation(outputs).numpy()
        arrays = {name: x.numpy().transpose(0, 2, 3, 1) for name, x in outputs.items()} | {"logits": logits}
        return arrays, {name: x.numpy() for name, x in self.state.items() if "/statistics/" in name}


@pytest.fixture(scope="module", params=["inference", "training"])
def ours(request, compile_quickly):
    return request.param, *run(request.param == "training")


def test_outputs_and_running_statistics_equal_stored_values_of_pytorch(ours):
    mode, outputs, statistics = ours
    golden = json.loads(GOLDENS.read_text())[mode]
    assert outputs.keys() == golden["outputs"].keys()
    for name, (shape, values) in golden["outputs"].items():
        assert outputs[name].shape == tuple(shape)
        np.testing.assert_allclose(sample(outputs[name]), values, atol=1e-4 * np.abs(values).max(), rtol=0)
    assert statistics.keys() == golden["statistics"].keys()
    for name, values in golden["statistics"].items():
        np.testing.assert_allclose(statistics[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


def test_outputs_and_running_statistics_equal_pytorch(ours):
    mode, outputs, statistics = ours
    expected, expected_statistics = Torch(mode == "training").run()
    for name, x in expected.items():
        np.testing.assert_allclose(outputs[name], x, atol=1e-4 * np.abs(x).max(), rtol=0)
    for name, values in expected_statistics.items():
        np.testing.assert_allclose(statistics[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


def test_without_projection_the_student_has_the_channels_of_resnet18():
    variables = shapes(Student(64, "batch", None), PHOTOGRAPHS, SIZES)
    assert not [name for name in variables["params"] if name.startswith("project")]
    run = jax.eval_shape(lambda v: Student(64, "batch", None).apply(v, PHOTOGRAPHS, SIZES, None), variables)
    assert [x.shape for x in run] == [(3, 12, 12, 64), (3, 6, 6, 128), (3, 3, 3, 256)]


@pytest.mark.parametrize("size", [(3, 5), (1, 1)])  # the pooled branch has one pixel
def test_group_norm_is_that_of_one_image_and_group_in_float64(size):
    """A group has at least eight channels, or a single pixel would be normalised to a sign."""
    x = np.random.default_rng(1).normal(2, 3, (2, *size, 64))
    scale, bias = np.random.default_rng(2).normal(size=(2, 64))
    params = {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}
    result = Norm("group").apply({"params": params}, jnp.asarray(x, jnp.float32), together(2))
    for image, group in np.ndindex(2, 8):
        channels = slice(8 * group, 8 * group + 8)
        part = x[image, ..., channels]
        expected = (part - part.mean()) / np.sqrt(part.var() + 1e-5) * scale[channels] + bias[channels]
        np.testing.assert_allclose(result[image, ..., channels], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
def test_a_convolution_and_its_gradients_are_those_of_xla(kernel_size, stride, size):
    rng, half = np.random.default_rng(0), kernel_size // 2
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, 3, 4)).astype(np.float32)
    weights = rng.normal(size=conv(x, kernel, stride).shape).astype(np.float32)

    def xla(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=numbers)

    def value_and_gradients(convolve):
        return jax.value_and_grad(lambda x, kernel: (convolve(x, kernel) * weights).sum(), argnums=(0, 1))(x, kernel)

    actual = value_and_gradients(lambda x, kernel: conv(x, kernel, stride))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(value_and_gradients(xla)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dilation", [1, 6, 12, 18])
@pytest.mark.parametrize("size", [(5, 7), (16, 20)])  # also smaller than the dilation
def test_a_dilated_convolution_and_its_gradients_are_those_of_xla(dilation, size):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    weights = rng.normal(size=(2, *size, 4)).astype(np.float32)

    def xla(x, kernel):
        padding, numbers = [(dilation, dilation)] * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, rhs_dilation=(dilation, dilation), dimension_numbers=numbers
        )

    def value_and_gradients(convolve):
        return jax.value_and_grad(lambda x, kernel: (convolve(x, kernel) * weights).sum(), argnums=(0, 1))(x, kernel)

    np.testing.assert_allclose(dilated_conv(x, kernel, dilation), xla(x, kernel), atol=1e-4)
    actual = value_and_gradients(lambda x, kernel: dilated_conv(x, kernel, dilation))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(value_and_gradients(xla)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_initial_weights_are_those_of_the_release():
    """Encoder blocks begin as the identity; normal by fan-out, or uniform within 1 / sqrt(fan-in) in the head."""
    student, head = Student(16, "batch", None), Head(24, "batch")
    init = jax.jit(lambda key: (student.init(key, PHOTOGRAPHS[:1], SIZES, None), head.init(key, x, None)))
    x = jnp.zeros((1, 12, 12, 8))
    (made, head_made) = init(jax.random.key(0))
    params, head_params = made["params"], head_made["params"]
    for name in ("encoder1_0", "encoder3_1"):
        assert not params[name]["norm2"]["scale"].any()
        assert (params[name]["norm1"]["scale"] == 1).all()
    assert (params["decoder3_1"]["norm2"]["scale"] == 1).all()
    for path in (("encoder4_1", "conv2"), ("decoder4_0", "conv1"), ("stem",)):
        kernel = params
        for name in path:
            kernel = kernel[name]
        kernel = np.asarray(kernel["kernel"])
        deviation = math.sqrt(2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3]))
        assert stats.kstest(kernel.ravel()[:5000], stats.norm(0, deviation).cdf).pvalue > 1e-3
    for name, fan_in in (("dilated12", 72), ("joined", 9 * 96), ("conv", 9 * 24), ("pooled", 8)):
        limit = fan_in**-0.5
        values = np.ravel(head_params[name]["kernel"])
        assert stats.kstest(values, stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3
    assert 0 < abs(float(head_params["classifier"]["bias"][0])) < 24**-0.5


@pytest.mark.parametrize("watched", [False, True])
def test_watched_blocks_store_the_mean_output_before_the_norm(watched):
    block = Block(4, "batch", watched=watched)
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    variables = seeded("block", block, x)
    _, stored = block.apply(variables, x, None, mutable=["activations", "intermediates"], capture_intermediates=True)
    if not watched:
        assert "activations" not in stored
        return
    output = stored["intermediates"]["conv2"]["__call__"][0]
    np.testing.assert_allclose(stored["activations"]["conv2"]["mean"], output.mean((1, 2)), atol=1e-6)


def test_products_are_minus_cosines_and_zero_features_have_finite_gradients():
    teacher = [np.random.default_rng(i).normal(size=(2, s, s, 3)).astype(np.float32) for i, s in enumerate((4, 2))]
    joined = products(teacher, [2 * x for x in teacher])
    assert joined.shape == (2, 4, 4, 6)
    np.testing.assert_allclose(joined[..., :3].sum(-1), -1, rtol=1e-5)
    np.testing.assert_allclose(joined[..., 3:].sum(-1), -1, rtol=1e-5)
    np.testing.assert_allclose(distances(teacher, [-x for x in teacher])[1], 2, rtol=1e-5)
    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), 0)


def test_focal_loss_by_hand():
    """A probability of 1/2 costs (1/2)^4 ln 2, certainty about the truth nothing, and certain errors their logit."""
    mask = np.array([[[0.0, 1.0]]])
    np.testing.assert_allclose(focal_loss(np.zeros((1, 1, 2)), mask, 4.0), 0.0433217, rtol=1e-5)
    np.testing.assert_allclose(focal_loss(np.array([[[-100.0, 100.0]]]), mask, 4.0), 0, atol=1e-12)
    np.testing.assert_allclose(focal_loss(np.array([[[100.0, -100.0]]]), mask, 4.0), 100, rtol=1e-6)
    logits = np.array([[[1.5, -0.7]]])
    p = np.array([1 / (1 + np.exp(1.5)), 1 / (1 + np.exp(0.7))])  # of the truth
    np.testing.assert_allclose(focal_loss(logits, mask, 2.0), ((1 - p) ** 2 * -np.log(p)).mean(), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda z: focal_loss(z, mask, 4.0).sum())(jnp.array([[[100.0, -100.0]]]))).all()


def test_resizing_has_half_pixel_centres():
    x = jnp.arange(4.0).reshape(1, 1, 4, 1)
    np.testing.assert_allclose(resize(x, (1, 2))[0, 0, :, 0], [0.5, 2.5])  # no antialiasing: between the middle two
    np.testing.assert_allclose(resize(x, (1, 8))[0, 0, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


if __name__ == "__main__":
    stored = {}
    for mode in ("inference", "training"):
        outputs, statistics = Torch(mode == "training").run()
        stored[mode] = {
            "outputs": {n: [x.shape, [round(float(v), 6) for v in sample(x)]] for n, x in outputs.items()},
            "statistics": {n: [round(float(v), 6) for v in x] for n, x in statistics.items()},
        }
    GOLDENS.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
