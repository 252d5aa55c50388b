"""State dicts of PyTorch, read from mapped files without torch and without executing pickled calls.

A .pth file is a pickle: a program for a small stack machine that may call any function. This module restricts Python's
unpickler to the few names and operations that a state dict needs. It extends the implementation in Python: the one in
C always hashes dictionary keys, and hashing nested tuples may overflow the stack or never end.

The arrays are views of the mapped file: a tensor takes memory only while somebody computes with it.
"""

import io
import json
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from iumad_jax.errors import UserError

MAX_BYTES = 2**32  # the file of ViT-B has 346 MB
MAX_PICKLE = 2**19  # bytes; the pickle of Lite0 has 42,349
MAX_CHECKPOINT_BYTES = 2**33  # that of Stable Diffusion 1.5 with averaged weights has 7,703,807,346
MAX_CHECKPOINT_PICKLE = 2**21  # bytes; 1,816 tensors take 289,160
MAX_PARTS = 8  # largest number of dimensions of a tensor, or of arguments of a call

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


class _Map(mmap.mmap):
    """A mapped file that zipfile accepts; before Python 3.13, mmap has no such method."""

    def seekable(self) -> bool:
        return True


Data = bytes | _Map


class _Incomplete(ValueError):
    """A download that failed: part of the file, or something in its place."""


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
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
    ("torch", "DoubleStorage"): np.dtype("<f8"),
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "HalfStorage"): np.dtype("<f2"),
    ("torch", "BFloat16Storage"): np.dtype(jnp.bfloat16),
    ("torch", "IntStorage"): np.dtype("<i4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}
_SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_OPERATIONS = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINSTRING
    EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID
"""


class _Unpickler(pickle._Unpickler):
    """Unpickler of state dicts, which replaces the names in a pickle by safe substitutes from _ALLOWED."""

    limit: ClassVar = MAX_PICKLE
    stack: list[Any]

    def __init__(self, data: memoryview | bytes):
        self.file = io.BytesIO(data[: self.limit])
        super().__init__(self.file)
        self.storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        """Load the pickle at the file's position, and move the position past it."""
        try:
            return super().load()
        except EOFError as error:
            raise ValueError(f"its pickle is incomplete or has more than {self.limit} bytes") from error

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it refers to {f'{module}.{name}'[:80]!r}, which no state dict needs")
        return _ALLOWED[module, name]

    def persistent_load(self, description: Any) -> _Storage:
        match description:
            case ("storage", np.dtype() as dtype, str(key), str(), int(count), *view) if view in ([], [None]):
                self.storages[key] = _Storage(key, dtype, count)
                return self.storages[key]
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


class _Ignored:
    """Stands for every object of a checkpoint that a state dict does not need; calls and items have no effect."""

    def __call__(self, *arguments: Any) -> "_Ignored":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass


_IGNORED = _Ignored()


class _DictOfCheckpoint(_StringKeyDict):
    """A dictionary that drops items whose keys are no strings, such as numbers of optimised parameters."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is str:
            super().__setitem__(key, value)


class _CheckpointUnpickler(_Unpickler):
    """Unpickler of training checkpoints, which hold a state dict and other objects; these are not created."""

    limit: ClassVar = MAX_CHECKPOINT_PICKLE

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: _DictOfCheckpoint()
        return _ALLOWED.get((module, name), _IGNORED)

    def _reduce(self) -> None:
        if self.stack[-2] is _IGNORED:
            self.stack.pop()
        else:
            super()._reduce()

    dispatch: ClassVar[dict[int, Any]] = {
        **_Unpickler.dispatch,
        pickle.BINFLOAT[0]: pickle._Unpickler.dispatch[pickle.BINFLOAT[0]],
        pickle.EMPTY_DICT[0]: lambda self: self.append(_DictOfCheckpoint()),
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,  # class and arguments: only of objects that are ignored
    }


def _state_dict(content: Any) -> dict[str, _Tensor]:
    if type(content) is _DictOfCheckpoint and type(content.get("state_dict")) is _DictOfCheckpoint:
        content = content["state_dict"]
    if not isinstance(content, _StringKeyDict):
        raise ValueError("it is not a dictionary of tensors")
    for name, value in content.items():
        if type(value) is not _Tensor:
            raise ValueError(f"its entry {name[:80]!r} is not a tensor")
    return content


def _read_zip(data: Data, unpickler: type[_Unpickler]) -> tuple[dict[str, _Tensor], dict[str, memoryview]]:
    """Read PyTorch's format since 1.6: an uncompressed zip archive of the pickle and one file per storage."""
    file: Any = data if isinstance(data, _Map) else io.BytesIO(data)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:  # its directory comes last
        raise _Incomplete(f"it ends after {len(data)} bytes, without the directory of its parts") from error
    with archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if sum(entry.file_size for entry in entries.values()) > len(data):
            raise ValueError("its parts are compressed or overlap, which PyTorch never does")

        def part(name: str) -> memoryview:
            entry = entries[name]
            archive.open(entry).close()  # checks the entry's own header
            names = struct.unpack_from("<HH", data, entry.header_offset + 26)  # lengths of two fields after 30 bytes
            begin = entry.header_offset + 30 + sum(names)
            content = memoryview(data)[begin : begin + entry.file_size]
            if entry.compress_type != zipfile.ZIP_STORED or zlib.crc32(content) != entry.CRC:
                raise ValueError(f"its part {name[:80]!r} is compressed, or its CRC-32 is wrong")
            return content

        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} data.pkl instead of one")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in entries and part(folder + "byteorder") != b"little":
            raise ValueError("it is big-endian")
        tensors = _state_dict(unpickler(part(pickles[0])).load())
        keys = {tensor.storage.key for tensor in tensors.values()}
        return tensors, {key: part(f"{folder}data/{key}") for key in keys}


def _read_legacy(data: Data, unpickler: type[_Unpickler]) -> tuple[dict[str, _Tensor], dict[str, memoryview]]:
    """Read PyTorch's format before 1.6: five pickles, then each storage as an 8-byte count and its elements."""
    reader = unpickler(data[: unpickler.limit])
    if reader.load() != _LEGACY_MAGIC:
        raise ValueError("it is not a PyTorch file")
    version, system, content, keys = (reader.load() for _ in range(4))
    if version != _LEGACY_VERSION or system["little_endian"] is not True:
        raise ValueError("its version or byte order is not supported")
    tensors = _state_dict(content)
    storages, end = {}, reader.file.tell()
    for key in keys:
        if type(key) is not str:
            raise ValueError("the key of a storage is not a string")
        (count,) = struct.unpack_from("<q", data, end)
        begin, end = end + 8, end + 8 + count * reader.storages[key].dtype.itemsize
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


def _read_pth(data: Data, unpickler: type[_Unpickler]) -> dict[str, np.ndarray]:
    read = _read_zip if data[:4] == b"PK\x03\x04" else _read_legacy
    tensors, storages = read(data, unpickler)
    return {name: _as_array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_safetensors(data: Data) -> dict[str, np.ndarray]:
    """Read an 8-byte length, a JSON header of this length, and the numbers at the offsets that the header gives."""
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_PICKLE:
        raise ValueError(f"its header has more than {MAX_PICKLE} bytes")
    if len(data) < 8 + length:
        raise _Incomplete(f"it ends after {len(data)} bytes, within its header")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > len(data):
            raise _Incomplete(f"it ends after {len(data)} bytes, before tensor {name[:80]!r}")
        array = np.ndarray(entry["shape"], _SAFETENSORS[entry["dtype"]], memoryview(data)[begin:end])
        if not 8 + length <= begin <= end or array.nbytes != end - begin:
            raise ValueError(f"the offsets of tensor {name[:80]!r} do not fit its shape")
        tensors[name] = array
    return tensors


def parse(data: Data, path: Path, *, checkpoint: bool = False) -> dict[str, np.ndarray]:
    """Parse a .pth (either format) or .safetensors file into the tensors of its state dict, by name: views of `data`.

    The format is told by the content, whatever the file is called.

    Args:
        data: Content of the file.
        path: The file, for error messages.
        checkpoint: Whether a pickle may be a training checkpoint: a dictionary with `state_dict` and other entries,
            which are ignored whatever they hold.

    Raises:
        UserError: If the file is damaged, or is not a flat dictionary of tensors.
    """
    try:
        if not len(data):
            raise _Incomplete("it is empty")
        if data[8:9] == b"{":
            return _read_safetensors(data)
        if data[:15] == b"version https:/":
            raise _Incomplete("it is a pointer to a file in Git LFS")
        if data[:64].lstrip()[:1] == b"<":
            raise _Incomplete("it is a web page")
        return _read_pth(data, _CheckpointUnpickler if checkpoint else _Unpickler)
    except Exception as error:  # hostile bytes may cause any exception
        remedy = "download the file again" if isinstance(error, _Incomplete) else "use a plain state dict of tensors"
        reason = (
            error if type(error) in (ValueError, _Incomplete) else f"it is damaged ({type(error).__name__}: {error})"
        )
        raise UserError(f"weights file {path} is refused: {reason}; {remedy}.") from error


def map_file(path: Path, limit: int = MAX_BYTES) -> Data:
    """Map a file for reading.

    Raises:
        UserError: If the file cannot be read, or has more bytes than the limit.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UserError(
                    f"weights file {path} has more than {limit} bytes; use the state dict of a single network."
                )
            return _Map(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read ({error.strerror}); check the path.") from error
