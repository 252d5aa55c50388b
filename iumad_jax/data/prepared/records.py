"""Files of a prepared set: .npy arrays with one row per image, and a manifest that describes the images.

While a set is incomplete, a journal beside the arrays lists the rows that have been written.
"""

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

Values = dict[str, np.ndarray]  # arrays of one image by name
_JOURNAL, MANIFEST = "journal", "manifest.json"


class Source(TypedDict):
    """State of a source file when it was hashed."""

    sha256: str
    stamp: list[int]  # size in bytes, mtime and ctime in nanoseconds


class Image(TypedDict, total=False):
    """Description of a prepared image; `id` and `sources` identify its source image."""

    id: str
    sources: dict[str, Source]  # state of each source file by path
    defect: str
    size: list[int]  # rows and columns of the source image
    seen: list[int]  # rows and columns of the part of it that is seen, see `region`
    invalid_depth: float | None  # fraction of the pixels seen without valid depth; None without depth
    mask_area: float | None  # fraction of the pixels seen that are in the mask; None without a mask
    crc32: int  # see `checksum`


class Manifest(TypedDict):
    """Description of a prepared set; images are listed in the order of the rows."""

    format: int  # `store.FORMAT` when the set was prepared
    settings: Any  # settings that the arrays depend on, as JSON
    rows: str  # name of the folder that holds the arrays
    images: list[Image]


def digest(content: Any) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def content_key(image: Image) -> str:
    """Hash the id and source files of an image; arrays prepared for an image with an equal key may be reused."""
    return digest([image["id"], [[file, source["sha256"]] for file, source in image["sources"].items()]])


def hash_file(file: Path, previous: Source | None) -> Source:
    """Hash a source file; the previous hash is reused while size, mtime and ctime are unchanged.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if previous is not None and previous["stamp"] == stamp:
            return previous
        with file.open("rb") as stream:
            return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "stamp": stamp}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); replace it or make it readable.") from error


def checksum(values: Values) -> int:
    """Return the CRC-32 of an image's arrays with their names, types and shapes."""
    crc = 0
    for name, value in sorted(values.items()):
        crc = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), crc)
        crc = zlib.crc32(value.tobytes(), crc)
    return crc


def load(folder: Path, names: Sequence[str], count: int) -> Values:
    """Memory-map the named arrays, (count, ...) each; a missing or damaged file yields an array without rows."""
    return {name: _load(folder / f"{name}.npy", count) for name in names}


def _load(file: Path, count: int) -> np.ndarray:
    with suppress(Exception):  # a damaged header can make NumPy raise any exception
        array = np.load(file, mmap_mode="r")
        if len(array) == count and _starts_with(file, _header(array.shape, array.dtype)):
            return array  # `Writer` replaces files with another header, so their rows cannot be reused
    return np.zeros((0,))


def row(arrays: Values, index: int) -> Values | None:
    """Return the arrays of one image; None if one of them is missing."""
    if any(index >= len(array) for array in arrays.values()):
        return None
    return {name: np.asarray(array[index]) for name, array in arrays.items()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes the set it describes valid.

    Raises:
        UserError: If it cannot be written.
    """
    content = {"sha256": digest(manifest), "manifest": manifest}
    write_whole(folder / MANIFEST, json.dumps(content, indent=1).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a set; None if it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["sha256"] == digest(content["manifest"]):
            return content["manifest"]
    return None


class Writer:
    """Context manager that writes rows in any order. Rows in the journal survive even if the process is killed.

    The files have their full length from the start. They are not memory-mapped, because on a full disk writing to a
    mapped file kills the process.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Writer":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = self._stack.enter_context((self._folder / _JOURNAL).open("ab"))
        self._journal.write(b"\n")  # ends a line that a crash left incomplete
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, index: int, values: Values) -> None:
        """Write the arrays of one image."""
        for name, value in values.items():
            if name not in self._files:
                self._files[name] = self._open(self._folder / f"{name}.npy", value)
            file, start = self._files[name]
            file.seek(start + index * value.nbytes)
            file.write(value.tobytes())

    def record(self, images: dict[int, Image]) -> None:
        """Record written rows in the journal, so that an interrupted preparation can be resumed."""
        for file, _ in self._files.values():
            file.flush()
        lines = (json.dumps([index, self._count, image]) for index, image in images.items())
        self._journal.write("".join(f"{zlib.crc32(line.encode()):08x} {line}\n" for line in lines).encode())
        self._journal.flush()

    def remove_journal(self) -> None:
        """Remove the journal once the manifest has replaced it."""
        (self._folder / _JOURNAL).unlink()

    def _open(self, file: Path, value: np.ndarray) -> tuple[BinaryIO, int]:
        header = _header((self._count, *value.shape), value.dtype)
        if not file.exists() or not _starts_with(file, header):
            file.unlink(missing_ok=True)  # not truncated: another process may have it mapped
            file.write_bytes(header)
        os.truncate(file, len(header) + self._count * value.nbytes)
        return self._stack.enter_context(file.open("r+b")), len(header)


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the .npy header of an array."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _starts_with(file: Path, prefix: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(prefix)) == prefix


def read_journal(folder: Path) -> tuple[dict[int, Image], int]:
    """Read the journal of an incomplete set, skipping lines that a crash left incomplete.

    Returns:
        The images whose rows have been written, by row, and the number of rows of the complete set.
    """
    rows: dict[int, Image] = {}
    count = 0
    with suppress(FileNotFoundError):
        for line in (folder / _JOURNAL).read_bytes().splitlines():
            crc, _, text = line.partition(b" ")
            if crc == f"{zlib.crc32(text):08x}".encode():
                index, count, image = json.loads(text)
                rows[index] = image
    return rows, count
