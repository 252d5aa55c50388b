"""Organised point clouds in PLY and PCD files: one point per pixel, row by row."""

import io
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from iumad_jax.data.formats.images import check_size
from iumad_jax.errors import UserError

_HEADER_BYTES = 1 << 14
_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "double": "f8", "float32": "f4", "float64": "f8",
}  # fmt: skip
_PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def read_ply(file: Path, size: tuple[int, int]) -> Float64[np.ndarray, "h w 3"]:
    """x, y and z of a PLY file's vertices, which come first in it.

    Rows and columns are told by `obj_info num_rows` and `num_cols`, else by `size`.

    Raises:
        UserError: it is not organised, or of an unknown kind.
        Exception: of any kind, where it is damaged.
    """
    header, body = _split(file, b"ply", b"end_header")
    rows = {key: int(value) for key, value in re.findall(r"^obj_info (num_rows|num_cols) (\d+)$", header, re.MULTILINE)}
    height, width = rows.get("num_rows", size[0]), rows.get("num_cols", size[1])
    kind = re.search(r"^format (\w+) 1\.0$", header, re.MULTILINE)
    vertices = re.search(r"^element (\w+) (\d+)\n((?:property .*\n|comment .*\n)*)", header, re.MULTILINE)
    if not kind or kind[1] not in _PLY_ORDERS or not vertices or vertices[1] != "vertex":
        raise UserError(f"{file} has a PLY header without a known format and vertices first; restore it.")
    properties = [line.split()[1:] for line in vertices[3].splitlines() if line.startswith("property")]
    if not all(len(words) == 2 and words[0] in _PLY_TYPES for words in properties):
        raise UserError(f"{file} has vertices with lists or unknown types; give x, y and z as numbers.")
    order = _PLY_ORDERS[kind[1]]
    fields = [(name, order + _PLY_TYPES[type_]) for type_, name in properties]
    return _points(file, body, fields, int(vertices[2]), (height, width), text=kind[1] == "ascii")


def read_pcd(file: Path) -> Float64[np.ndarray, "h w 3"]:
    """x, y and z of a PCD file (version 0.7), ASCII or binary.

    Raises:
        UserError: it is not organised, or of an unknown kind.
        Exception: of any kind, where it is damaged.
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
        raise UserError(f"{file} has an incomplete PCD header ({error}); restore it.") from error
    if data not in ("ascii", "binary"):
        raise UserError(f"{file} has the data {data}; save it as ascii or binary.")
    if height == 1:
        raise UserError(f"{file} is not organised: its height is 1; save the cloud with its rows and columns.")
    return _points(file, body, fields, points, (height, width), text=data == "ascii")


def _split(file: Path, first: bytes, last: bytes) -> tuple[str, bytes]:
    """The header of a file, line by line, and what follows it."""
    content = file.read_bytes()
    start = content[:_HEADER_BYTES]
    end = re.search(rb"^" + last + rb"\r?\n", start, re.MULTILINE)
    if not re.match(first, start) or not end:
        raise UserError(f"{file} is not a {file.suffix[1:].upper()} file; restore it.")
    return start[: end.end()].decode("latin-1").replace("\r\n", "\n"), content[end.end() :]


def _points(
    file: Path, body: bytes, fields: list[tuple], count: int, size: tuple[int, int], *, text: bool
) -> Float64[np.ndarray, "h w 3"]:
    check_size(file, size[1], size[0])
    if count != size[0] * size[1]:
        raise UserError(f"{file} has {count} points; an organised cloud of {size[0]} rows has {size[1]} in each.")
    names = [field[0] for field in fields]
    if any(names.count(axis) != 1 for axis in "xyz"):
        raise UserError(f"{file} has points of {' '.join(names)}; give x, y and z, each once.")
    if not body.strip():
        raise UserError(f"{file} has no points after its header; restore it.")
    if text:
        starts = np.cumsum([0, *(field[2] if len(field) > 2 else 1 for field in fields)])
        columns = [int(starts[names.index(axis)]) for axis in "xyz"]
        points = np.loadtxt(io.BytesIO(body), usecols=columns, max_rows=count, ndmin=2)
    else:
        own = [(name if name in "xyz" else f"other {index}", *rest) for index, (name, *rest) in enumerate(fields)]
        table = np.frombuffer(body, np.dtype(own), count)
        with np.errstate(invalid="ignore"):  # signalling NaN
            points = np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=-1)
    return points.reshape(*size, 3)
