"""Prepared images on disk: .npy files with one row per image, a journal while they grow, and a manifest when whole."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np

from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import write_whole

Values = dict[str, np.ndarray]  # one image's arrays by name
_JOURNAL, MANIFEST = "journal", "manifest.json"


class Source(TypedDict):
    """A file as it was when it was hashed."""

    sha256: str
    stamp: list[int]  # bytes; nanoseconds of the last change of the content, and of its entry in the file system


class Image(TypedDict, total=False):
    """What is known of a prepared image; the first two keys say what it is made from."""

    id: str
    sources: dict[str, Source]  # by path
    defect: str
    size: list[int]  # pixels of the source, rows and columns
    invalid_depth: float | None  # share of its pixels; None without depth
    mask_area: float | None  # the same; None where nobody marked the defect
    crc32: int


class Manifest(TypedDict):
    """What a prepared set is made from and holds; images in the order of the rows."""

    format: int  # of the store that prepared it
    settings: Any
    rows: str  # the folder of its arrays
    images: list[Image]


def digest(content: Any) -> str:
    """The SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def key(image: Image) -> str:
    """A prepared image may be used wherever this is the same."""
    return digest([image["id"], [[file, source["sha256"]] for file, source in image["sources"].items()]])


def hashed(file: Path, known: Source | None) -> Source:
    """A source file's hash, which is taken anew only if its size or one of its times has changed.

    Raises:
        UserError: it cannot be read.
    """
    try:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known is not None and known["stamp"] == stamp:
            return known
        with file.open("rb") as stream:
            return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "stamp": stamp}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); restore it from the dataset.") from error


def checksum(values: Values) -> int:
    """The CRC-32 of an image's arrays, their names, types and shapes."""
    crc = 0
    for name, value in sorted(values.items()):
        crc = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), crc)
        crc = zlib.crc32(value.tobytes(), crc)
    return crc


def load(folder: Path, names: Sequence[str], count: int) -> Values:
    """StrategyState-mapped arrays (count, ...); of a file that is missing or damaged, no rows at all."""
    return {name: _load(folder / f"{name}.npy", count) for name in names}


def _load(file: Path, count: int) -> np.ndarray:
    with suppress(Exception):  # NumPy raises whatever a damaged header leads to
        array = np.load(file, mmap_mode="r")
        if len(array) == count and _starts_with(file, _header(array.shape, array.dtype)):
            return array  # else `Writer` would begin the file anew, and rows that seem unharmed be lost
    return np.zeros((0,))


def row(arrays: Values, index: int) -> Values | None:
    """One image's arrays, None if one of them is missing."""
    if any(index >= len(array) for array in arrays.values()):
        return None
    return {name: np.asarray(array[index]) for name, array in arrays.items()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """From here on the set is what the manifest says.

    Raises:
        UserError: it cannot be written.
    """
    content = {"sha256": digest(manifest), "manifest": manifest}
    write_whole(folder / MANIFEST, json.dumps(content, indent=1).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a set, None if it has none or a damaged one."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["sha256"] == digest(content["manifest"]):
            return content["manifest"]
    return None


class Writer:
    """Writes rows in any order. What is noted stays, whenever the process is killed.

    The files have their full length from the start and are written as files: a memory-mapped one would kill us on a
    full disk.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Writer":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = self._stack.enter_context((self._folder / _JOURNAL).open("ab"))
        self._journal.write(b"\n")  # behind a line that a crash left unfinished
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, index: int, values: Values) -> None:
        """Writes one image's arrays."""
        for name, value in values.items():
            if name not in self._files:
                self._files[name] = self._open(self._folder / f"{name}.npy", value)
            file, start = self._files[name]
            file.seek(start + index * value.nbytes)
            file.write(value.tobytes())

    def note(self, images: dict[int, Image]) -> None:
        """Notes rows that have been written, so that they are found again."""
        for file, _ in self._files.values():
            file.flush()
        lines = (json.dumps([index, self._count, image]) for index, image in images.items())
        self._journal.write("".join(f"{zlib.crc32(line.encode()):08x} {line}\n" for line in lines).encode())
        self._journal.flush()

    def finish(self) -> None:
        """Gives up the journal, when a manifest has taken its place."""
        (self._folder / _JOURNAL).unlink()

    def _open(self, file: Path, value: np.ndarray) -> tuple[BinaryIO, int]:
        start = _header((self._count, *value.shape), value.dtype)
        if not file.exists() or not _starts_with(file, start):
            file.unlink(missing_ok=True)  # not emptied: another process may have it mapped
            file.write_bytes(start)
        os.truncate(file, len(start) + self._count * value.nbytes)
        return self._stack.enter_context(file.open("r+b")), len(start)


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """With which a file of rows begins."""
    header = io.BytesIO()
    what = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, what)
    return header.getvalue()


def _starts_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def read_journal(folder: Path) -> tuple[dict[int, Image], int]:
    """The rows that an unfinished folder has, less what a crash left unfinished, and how many it will have."""
    rows: dict[int, Image] = {}
    count = 0
    with suppress(FileNotFoundError):
        for line in (folder / _JOURNAL).read_bytes().splitlines():
            crc, _, text = line.partition(b" ")
            if crc == f"{zlib.crc32(text):08x}".encode():
                index, count, image = json.loads(text)
                rows[index] = image
    return rows, count
