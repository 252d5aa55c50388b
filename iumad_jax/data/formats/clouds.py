"""Reads point clouds from PLY and PCD files, organised (one point per pixel, row by row) or not."""

import io
import re
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from iumad_jax.data.formats.images import MAX_SIDE, check_size
from iumad_jax.errors import UserError

_HEADER_BYTES = 1 << 14
_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "double": "f8", "float32": "f4", "float64": "f8",
}  # fmt: skip
_PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def read_ply(file: Path, size: tuple[int, int] | None) -> Float64[np.ndarray, "h w 3"]:
    """Read x, y and z of the vertices of a PLY file, which must be its first element; one row of them if unorganised.

    Args:
        file: A PLY file, ASCII or binary.
        size: Rows and columns of the cloud, unless the header has `obj_info num_rows` and `obj_info num_cols`; None if
            unknown.

    Raises:
        UserError: If the variant of the format is not supported.
        Exception: If the file is damaged; the type varies.
    """
    header, body = _split(file, b"ply", b"end_header")
    grid = {key: int(value) for key, value in re.findall(r"^obj_info (num_rows|num_cols) (\d+)$", header, re.MULTILINE)}
    format_ = re.search(r"^format (\w+) 1\.0$", header, re.MULTILINE)
    vertices = re.search(r"^element (\w+) (\d+)\n((?:property .*\n|comment .*\n)*)", header, re.MULTILINE)
    if not format_ or format_[1] not in _PLY_ORDERS or not vertices or vertices[1] != "vertex":
        raise UserError(f"{file} has a PLY header without a known format or vertices as first element; replace it.")
    properties = [line.split()[1:] for line in vertices[3].splitlines() if line.startswith("property")]
    if not all(len(words) == 2 and words[0] in _PLY_TYPES for words in properties):
        raise UserError(f"{file} has vertices with lists or unknown types; save x, y and z as numbers.")
    order, count = _PLY_ORDERS[format_[1]], int(vertices[2])
    height, width = (grid.get(key, size and size[axis]) for axis, key in enumerate(("num_rows", "num_cols")))
    if height is None or width is None or (not grid and count != height * width):
        height, width = 1, count
    fields = [(name, order + _PLY_TYPES[type_]) for type_, name in properties]
    return _points(file, body, fields, count, (height, width), text=format_[1] == "ascii")


def read_pcd(file: Path) -> Float64[np.ndarray, "h w 3"]:
    """Read x, y and z from a PCD file (version 0.7), ASCII, binary or compressed; one row of them if unorganised.

    Raises:
        UserError: If the variant of the format is not supported.
        Exception: If the file is damaged; the type varies.
    """
    header, body = _split(file, b"#|VERSION", b"DATA .*")
    keys = {key: values.split() for key, values in re.findall(r"^([A-Z]+) (.*)$", header, re.MULTILINE)}
    try:
        names, types, sizes = keys["FIELDS"], keys["TYPE"], keys["SIZE"]
        counts = [int(count) for count in keys.get("COUNT", ["1"] * len(names))]
        width, height, points = (int(keys[key][0]) for key in ("WIDTH", "HEIGHT", "POINTS"))
        fields = [
            (name, f"<{type_.lower()}{bytes_}", count)
            for name, type_, bytes_, count in zip(names, types, sizes, counts, strict=True)
        ]
        data = keys["DATA"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{file} has an incomplete PCD header ({error}); replace it.") from error
    if data == "binary_compressed":
        check_size(file, width, height)
        point = np.dtype([(f"{i}", *layout) for i, (_, *layout) in enumerate(fields)])
        body = _by_point(_unpack_lzf(body, points * point.itemsize), point)
    elif data not in ("ascii", "binary"):
        raise UserError(f"{file} has DATA {data}; save it as ascii or binary.")
    return _points(file, body, fields, points, (height, width), text=data == "ascii")


def _unpack_lzf(body: bytes, size: int) -> bytes:
    """Unpack LZF data, which follow their packed and unpacked sizes; raise ValueError unless they unpack to `size`.

    A byte below 32 is followed by that many bytes and one more, to be copied. Any other begins a repetition: three bits
    of the length (7 adds the next byte) and 13 bits of the distance from the end of what is unpacked already.
    """
    packed_size, unpacked_size = struct.unpack_from("<II", body)
    packed, unpacked = body[8 : 8 + packed_size], bytearray()
    if unpacked_size != size:
        raise ValueError("the sizes of packed points and header differ")
    at = 0
    while at < len(packed) and len(unpacked) <= size:
        control, at = packed[at], at + 1
        if control < 32:
            unpacked += packed[at : at + control + 1]
            at += control + 1
            continue
        length = (control >> 5) + 2
        if length == 9:
            length, at = length + packed[at], at + 1
        start = len(unpacked) - ((control & 31) << 8) - packed[at] - 1
        if start < 0:
            raise ValueError("a repetition begins before the data")
        at += 1
        piece = unpacked[start : start + length]
        unpacked += (piece * -(-length // len(piece)))[:length]  # it may repeat itself
    if len(unpacked) != size:
        raise ValueError("the points are incomplete")
    return bytes(unpacked)


def _by_point(body: bytes, point: np.dtype) -> bytes:
    """Convert fields that are stored one after the other, each for all points, to points."""
    table, at = np.empty(len(body) // point.itemsize, point), 0
    for name in point.names or ():
        column = np.frombuffer(body, point[name], len(table), at)
        table[name] = column
        at += column.nbytes
    return table.tobytes()


def _split(file: Path, first: bytes, last: bytes) -> tuple[str, bytes]:
    """Split a file into its header, as text with line feeds, and the bytes after it."""
    content = file.read_bytes()
    start = content[:_HEADER_BYTES]
    end = re.search(rb"^" + last + rb"\r?\n", start, re.MULTILINE)
    if not re.match(first, start) or not end:
        raise UserError(f"{file} is not a {file.suffix[1:].upper()} file; replace it.")
    return start[: end.end()].decode("latin-1").replace("\r\n", "\n"), content[end.end() :]


def _points(
    file: Path, body: bytes, fields: list[tuple], count: int, size: tuple[int, int], *, text: bool
) -> Float64[np.ndarray, "h w 3"]:
    """Decode x, y and z from the body of a file; `fields` are the (name, type[, count]) of a point's values."""
    if size[0] > 1:
        check_size(file, size[1], size[0])
    elif count > MAX_SIDE**2:
        raise UserError(f"{file} has {count} points; use at most {MAX_SIDE**2}.")
    if count != size[0] * size[1]:
        raise UserError(f"{file} has {count} points; save an organised cloud of {size[0]} x {size[1]} points.")
    names = [field[0] for field in fields]
    if any(names.count(axis) != 1 for axis in "xyz"):
        raise UserError(f"{file} has points with the fields {' '.join(names)}; save x, y and z, each once.")
    if not body.strip():
        raise UserError(f"{file} has no points after its header; replace it.")
    if text:
        starts = np.cumsum([0, *(field[2] if len(field) > 2 else 1 for field in fields)])
        columns = [int(starts[names.index(axis)]) for axis in "xyz"]
        points = np.loadtxt(io.BytesIO(body), usecols=columns, max_rows=count, ndmin=2)
    else:
        unique = [(name if name in "xyz" else f"other {i}", *layout) for i, (name, *layout) in enumerate(fields)]
        table = np.frombuffer(body, np.dtype(unique), count)
        with np.errstate(invalid="ignore"):  # signalling NaN
            points = np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=-1)
    return points.reshape(*size, 3)
