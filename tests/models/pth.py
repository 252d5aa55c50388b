"""Builder of .pth files from single pickle operations, including files that no library writes."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

PTH = Path("weights.pth")
HEAD = b"\x80\x02"
LEGACY_HEAD = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: tuple[int, ...]) -> bytes:
    return several(*map(number, values))


def storage(key: str, count: int, kind: str = "torch\nFloatStorage") -> bytes:
    return several(text("storage"), f"c{kind}\n".encode(), text(key), text("cpu"), number(count)) + b"Q"


def tensor(storage: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = several(storage, number(offset), numbers(shape), numbers(strides), b"\x89", hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def state_dict(**tensors: bytes) -> bytes:
    items = b"".join(text(name) + value for name, value in tensors.items())
    attributes = b"}" + text("_metadata") + b"}sb"  # modules add this to their state dicts
    return HEAD + b"ccollections\nOrderedDict\n)R(" + items + b"u" + attributes + b"."


def zipped(content: bytes, storages: dict[str, bytes], **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def legacy(content: bytes, storages: dict[str, bytes], itemsize: int = 4) -> bytes:
    tail = b"".join(struct.pack("<q", len(data) // itemsize) + data for data in storages.values())
    return LEGACY_HEAD + content + pickle.dumps(list(storages), 2) + tail


FORMATS = pytest.mark.parametrize("write", [zipped, legacy])
VALUES = np.arange(24, dtype=np.float32)
STORED = {"0": VALUES.tobytes()}
DEEP = b")" + b"\x85" * 500_000  # nested tuples
BOMB = b")" + b"q\0h\0\x86" * 60  # pairs of the same pair: 2**60 elements when traversed
WHOLE = storage("0", 24)
