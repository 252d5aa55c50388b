"""ResNets and DINOv2 compared with torchvision and with a definition in PyTorch; the choice of levels; export.

The golden values come from PyTorch. To write them again, with torch and torchvision installed:
`python tests/models/test_backbones.py`.
"""

import json
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

from iumad_jax.errors import UserError
from iumad_jax.export.onnx_converter import convert
from iumad_jax.models import pretrained
from iumad_jax.models.backbone import BACKBONES, FeatureExtractor
from iumad_jax.models.vit import resize_positions
from tests import sentences
from tests.models import pth
from tests.models.seeded import sample, seeded_images, seeded_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]

GOLDENS = Path(__file__).with_name("backbone_goldens.json")
SIZES = {  # of images
    "resnet18": (75, 64),  # odd at every stride
    "resnet50": (75, 64),
    "wide_resnet50_2": (75, 64),
    "dinov2_vits14": (60, 72),  # resized to 56 x 70: 4 x 5 patches
    "dinov2_vitb14": (42, 42),
}
HEADS = {"dinov2_vits14": 6, "dinov2_vitb14": 12}


def resnet_shapes(bottleneck: bool, repeats: tuple[int, ...], hidden: int, out: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in torchvision's state dict, without layer4."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, norm: str, outputs: int, inputs: int, size: int) -> None:
        shapes[f"{name}.weight"] = outputs, inputs, size, size
        shapes.update({f"{norm}.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for layer, blocks in enumerate(repeats, 1):
        for i in range(blocks):
            prefix = f"layer{layer}.{i}."
            widths = [inputs, hidden, hidden, out] if bottleneck else [inputs, out, out]
            for j, size in enumerate((1, 3, 1) if bottleneck else (3, 3)):
                conv(f"{prefix}conv{j + 1}", f"{prefix}bn{j + 1}", widths[j + 1], widths[j], size)
            if inputs != out:
                conv(f"{prefix}downsample.0", f"{prefix}downsample.1", out, inputs, 1)
            inputs = out
        hidden, out = 2 * hidden, 2 * out
    return shapes | {"fc.weight": (1000, 8), "fc.bias": (1000,), "layer4.0.conv1.weight": (1, 1, 1, 1)}


def dinov2_shapes(d: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in the state dicts of DINOv2."""
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1370, d), "mask_token": (1, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,)}
    dense = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for i in range(12):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{part}": (d,) for part in ("weight", "bias")}
        shapes |= {f"blocks.{i}.{name}.gamma": (d,) for name in ("ls1", "ls2")}
        for name, shape in dense.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


SHAPES = {
    "resnet18": resnet_shapes(False, (2, 2, 2), 64, 64),
    "resnet50": resnet_shapes(True, (3, 4, 6), 64, 256),
    "wide_resnet50_2": resnet_shapes(True, (3, 4, 6), 128, 256),
    "dinov2_vits14": dinov2_shapes(384),
    "dinov2_vitb14": dinov2_shapes(768),
}


def levels(backbone: str) -> tuple[int, ...]:
    """Return the levels that are compared: the default ones of DINOv2, all of others."""
    architecture = BACKBONES[backbone].architecture
    return architecture.default_levels if backbone in HEADS else architecture.levels


@cache
def seeded(backbone: str) -> dict[str, np.ndarray]:
    return seeded_state(SHAPES[backbone])


@cache
def random(backbone: str) -> dict[str, Any]:
    return pretrained.random(backbone)


def save_safetensors(folder: Path, state: dict[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_pth(folder: Path, state: dict[str, np.ndarray]) -> Path:
    """Save as PyTorch does."""
    views = {}
    for key, (name, value) in enumerate(state.items()):
        strides = tuple(stride // value.itemsize for stride in value.strides)
        views[name] = pth.tensor(pth.storage(str(key), value.size), 0, value.shape, strides)
    storages = {str(key): value.tobytes() for key, value in enumerate(state.values())}
    (folder / "weights.pth").write_bytes(pth.zipped(pth.state_dict(**views), storages))
    return folder / "weights.pth"


def torch_resnet(backbone: str, images: Any) -> list[Any]:
    """Return the outputs of the layers 1 to 3 of torchvision's model."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, backbone)().eval()
    behind = ("fc.", "layer4.")
    shapes = {name: shape for name, shape in SHAPES[backbone].items() if not name.startswith(behind)}
    assert {name for name in model.state_dict() if not name.startswith(behind)} == shapes.keys()
    state = {name: torch.from_numpy(seeded(backbone)[name]) for name in shapes}
    model.load_state_dict(state, strict=False)
    layer1 = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images)))))
    layer2 = model.layer2(layer1)
    return [layer1, layer2, model.layer3(layer2)]


def torch_dinov2(backbone: str, images: Any) -> list[Any]:
    """Compute DINOv2 from its state dict: the normalised patch tokens after the blocks 2, 5, 8 and 11."""
    torch = pytest.importorskip("torch")
    functional, heads = torch.nn.functional, HEADS[backbone]
    state = {name: torch.from_numpy(value) for name, value in seeded(backbone).items()}
    rows, columns = (14 * round(n / 14) for n in images.shape[2:])
    images = functional.interpolate(images, (rows, columns), mode="bilinear", antialias=True)
    x = functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    b, d, h, w = x.shape
    table = state["pos_embed"]
    grid = table[:, 1:].reshape(1, 37, 37, d).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
    assert grid.shape == (1, d, h, w)
    patches = x.flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)
    x = torch.cat([(state["cls_token"] + table[:, :1]).expand(b, 1, d), patches], 1)

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (d,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def dense(x: Any, name: str) -> Any:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    outputs = []
    for i in range(12):
        p = f"blocks.{i}."
        qkv = dense(norm(x, f"{p}norm1"), f"{p}attn.qkv").reshape(b, -1, 3, heads, d // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = ((q * (d // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + state[f"{p}ls1.gamma"] * dense(attended.transpose(1, 2).reshape(b, -1, d), f"{p}attn.proj")
        hidden = functional.gelu(dense(norm(x, f"{p}norm2"), f"{p}mlp.fc1"))
        x = x + state[f"{p}ls2.gamma"] * dense(hidden, f"{p}mlp.fc2")
        if i in (2, 5, 8, 11):
            outputs.append(norm(x, "norm")[:, 1:].transpose(1, 2).reshape(b, d, h, w))
    return outputs


def reference(backbone: str) -> list[np.ndarray]:
    """Return channels-last outputs of PyTorch at `levels` for the seeded images."""
    torch = pytest.importorskip("torch")
    normalised = (seeded_images(*SIZES[backbone]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    images = torch.from_numpy(normalised.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        outputs = (torch_dinov2 if backbone in HEADS else torch_resnet)(backbone, images)
    return [x.numpy().transpose(0, 2, 3, 1) for x in outputs]


@pytest.fixture(scope="module", params=SIZES)
def ours(request, compile_quickly) -> tuple[str, list[np.ndarray]]:
    """Return a backbone, and its outputs at `levels` for the seeded images."""
    backbone = request.param
    network, architecture, mean, std = BACKBONES[backbone]
    variables = pretrained.convert(seeded(backbone), backbone, Path("seeded.pth"))
    images = (seeded_images(*SIZES[backbone]) - np.float32(mean)) / np.float32(std)
    module = network(architecture, levels(backbone))
    outputs = jax.jit(module.apply)({"params": variables["params"]["backbone"]}, images)
    return backbone, [np.asarray(x) for x in outputs]


def test_outputs_equal_stored_values_of_pytorch(ours):
    backbone, outputs = ours
    golden = json.loads(GOLDENS.read_text())[backbone]
    assert [list(x.shape) for x in outputs] == golden["shapes"]
    for x, values in zip(outputs, golden["values"], strict=True):
        np.testing.assert_allclose(sample(x), values, atol=1e-4 * np.abs(values).max(), rtol=0)


def test_outputs_equal_pytorch(ours):
    backbone, outputs = ours
    for x, y in zip(outputs, reference(backbone), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max(), rtol=0)


@pytest.mark.parametrize(
    ("backbone", "change", "message"),
    [
        ("resnet18", {"layer2.1.bn2.weight": None}, sentences.TENSOR_MISSING.format(r"layer2\.1\.bn2\.weight")),
        ("resnet18", {"layer5.0.bn1.bias": np.ones(1)}, sentences.TENSOR_UNKNOWN.format(r"layer5\.0\.bn1\.bias")),
        ("resnet18", {"conv1.bias": np.ones(64)}, sentences.TENSOR_UNKNOWN.format(r"conv1\.bias")),
        ("dinov2_vits14", {"blocks.7.ls2.gamma": None}, sentences.TENSOR_MISSING.format(r"blocks\.7\.ls2\.gamma")),
        ("dinov2_vits14", {"register_tokens": np.ones(1)}, sentences.TENSOR_UNKNOWN.format("register_tokens")),
        (
            "dinov2_vits14",
            {"pos_embed": np.ones((1, 257, 384), np.float32)},
            sentences.TENSOR_OF_WRONG_SHAPE.format(expected=r"\(1, 1370, 384\)", found=r"\(1, 257, 384\)"),
        ),
    ],
)
def test_state_dicts_of_other_networks_are_refused(backbone, change, message):
    state = {name: value for name, value in (seeded(backbone) | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        pretrained.convert(state, backbone, Path("seeded.pth"))


@pytest.mark.parametrize("write", [save_safetensors, save_pth])
def test_a_file_is_mapped_and_its_tensors_are_converted_one_by_one(tmp_path, write):
    """NumPy reports its memory to tracemalloc; a mapped file is none of it."""
    state = seeded("dinov2_vits14")
    path = write(tmp_path, state)
    tracemalloc.start()
    try:
        variables = pretrained.load("dinov2_vits14", str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    converted = sum(array.nbytes for array in jax.tree.leaves(variables))
    assert converted > 80e6
    assert peak < converted + 3 * max(value.nbytes for value in state.values())
    expected = pretrained.convert(state, "dinov2_vits14", path)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize(
    ("backbone", "more", "levels", "channels"),
    [
        ("efficientnet_lite0", "2,4", "4", np.r_[16:40]),
        ("resnet18", "", "8", np.r_[:128]),
        ("dinov2_vits14", "0,1", "1", np.r_[384:768]),
    ],
)
def test_chosen_levels_are_channels_of_all_and_nothing_behind_them_is_computed(backbone, more, levels, channels):
    variables, images = random(backbone), seeded_images(28)
    extractor = FeatureExtractor(backbone, 3, levels)
    needed = jax.eval_shape(extractor.init, jax.random.key(0), images)["params"]["backbone"]
    params = {"backbone": {name: variables["params"]["backbone"][name] for name in needed}}
    assert len(params["backbone"]) < len(variables["params"]["backbone"])
    features = jax.jit(extractor.apply)({"params": params}, images)
    expected = jax.jit(FeatureExtractor(backbone, 3, more).apply)(variables, images)[..., channels]
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "levels", "known"),
    [
        ("efficientnet_lite0", "8,32", "2,4,8,16"),
        ("efficientnet_lite0", "16,8", "2,4,8,16"),
        ("efficientnet_lite0", "8,8", "2,4,8,16"),
        ("efficientnet_lite0", "8, 16", "2,4,8,16"),
        ("resnet18", "2", "4,8,16"),
        ("dinov2_vits14", "12", "0,1,2,3,4,5,6,7,8,9,10,11"),
    ],
)
def test_unknown_levels_are_refused(backbone, levels, known):
    with pytest.raises(UserError, match=sentences.UNKNOWN_LEVELS.format(found=levels, known=known)):
        FeatureExtractor(backbone, 14, levels)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet18", 128 + 256),
        ("dinov2_vits14", 4 * 384),
    ],
)
def test_feature_shapes_for_the_papers_size(backbone, channels):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    features, _ = jax.eval_shape(FeatureExtractor(backbone, 14).init_with_output, jax.random.key(0), images)
    assert features.shape == (1, 14, 14, channels)


def test_positions_of_the_training_size_are_not_interpolated():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(37, 37, 2)))
    np.testing.assert_array_equal(resize_positions(table, 37, 37), table)
    assert np.abs(resize_positions(table, 37, 36)[:, :-1] - table[:, :-2]).max() > 0.1


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [("efficientnet_lite0", "2,4"), ("resnet18", ""), ("dinov2_vits14", "0")],
)
def test_exported_extractors_have_the_same_features(backbone, levels):
    variables, images = random(backbone), seeded_images(45)
    extractor = FeatureExtractor(backbone, 4, levels)
    spec = {"images": jax.ShapeDtypeStruct(images.shape, images.dtype)}
    model = convert(lambda x: (extractor.apply(variables, x),), spec, ["features"])
    (actual,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": images})
    expected = np.asarray(jax.jit(extractor.apply)(variables, images))
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


if __name__ == "__main__":
    stored = {}
    for backbone in SIZES:
        outputs = reference(backbone)
        values = [[round(float(v), 6) for v in sample(x)] for x in outputs]
        stored[backbone] = {"shapes": [list(x.shape) for x in outputs], "values": values}
    GOLDENS.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
