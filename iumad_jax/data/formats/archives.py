"""Unpacks a dataset's archive, which need not be trusted: plain files and folders, into a new folder, up to a size."""

import gzip
import hashlib
import json
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import locked

_FORMATS: dict[str, Any] = {".tar": lambda stream: stream, ".tar.gz": gzip.open, ".tar.xz": lzma.open, ".zip": None}
_BESIDES = 1 << 20  # bytes that a .tar may have between the contents of two files
_BLOCK = 1 << 20
_DEEPEST = 32  # folders within each other
_RECORD = ".archive.json"  # in the unpacked folder: what it was unpacked from
_DAMAGE = (
    EOFError,
    LookupError,
    NotImplementedError,  # and further what the libraries raise for what they cannot read
    RuntimeError,
    ValueError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


class Limits(NamedTuple):
    """What may come out of an archive."""

    bytes: int
    entries: int


class _Entry(NamedTuple):
    name: str
    size: int
    content: Any  # a binary stream; None for a folder


def unpack(archive: Path, root: Path, limits: Limits) -> str:
    """Unpacks a .tar, .tar.gz, .tar.xz or .zip into a new folder, which is there whole or not at all.

    What an interrupted call left is removed by the next, and one that finds the folder unpacked from the same archive
    does nothing more.

    Returns:
        The archive's SHA-256.

    Raises:
        UserError: the folder holds something else or cannot be written; or the archive is of another format, truncated
            or damaged, exceeds the limits, or has an entry that is neither a file nor a folder, that would lie
            elsewhere, or that comes twice.
    """
    if not archive.name.endswith(tuple(_FORMATS)):
        raise UserError(f"--archive is {archive}; name one that ends in {', '.join(_FORMATS)}.")
    try:
        with archive.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--archive is {archive}, which cannot be read ({error.strerror}).") from error
    unfinished = root.with_name(root.name + ".unpacking")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with locked(root.with_name(root.name + ".lock"), f"{root}: another process unpacks this; waiting for it."):
            if root.exists() and any(root.iterdir()):
                if _unpacked_from(root) != sha256:
                    raise UserError(
                        f"config.dataset.root is {root}, which was not unpacked from {archive.name} but is not empty;"
                        " leave --archive out or name a new folder."
                    )
                return sha256
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                unfinished.mkdir()
                _write(archive, unfinished, limits)
                (unfinished / _RECORD).write_text(json.dumps({"name": archive.name, "sha256": sha256}))
                unfinished.replace(root)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except _DAMAGE as error:
        raise UserError(f"{archive} is truncated or damaged ({error}); fetch it again.") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked to {root} ({error.strerror}); nothing was kept.") from error
    return sha256


def _unpacked_from(root: Path) -> str | None:
    try:
        return json.loads((root / _RECORD).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(archive: Path, folder: Path, limits: Limits) -> None:
    """Writes what an archive holds; owners, rights and times are left to the system."""
    size = 0
    for number, entry in enumerate(_entries(archive), 1):
        size += entry.size
        if number > limits.entries:
            raise UserError(f"{archive} has more than {limits.entries} entries; allow more with --archive_entries.")
        if size > limits.bytes:
            raise UserError(f"{archive} unpacks to more than {limits.bytes / 1e9:g} GB; allow more with --archive_gb.")
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts or len(path.parts) > _DEEPEST:
            raise UserError(f"{archive} has an entry {entry.name!a}, which leads elsewhere; do not trust it.")
        try:
            if entry.content is None:
                (folder / path).mkdir(parents=True, exist_ok=True)
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("xb") as file:
                left = entry.size
                while block := entry.content.read(min(left, _BLOCK) if left else 1):
                    left -= len(block)
                    if left < 0:
                        raise ValueError(f"{entry.name!a} is longer than it should be")
                    file.write(block)
                if left:
                    raise EOFError(f"{entry.name!a} ends too early")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                f"{archive} has an entry {entry.name!a} in the place of another; do not trust it."
            ) from error


def _entries(archive: Path) -> Iterator[_Entry]:
    """Every file and folder; a file must be read before the next entry is asked for."""
    suffix = next(suffix for suffix in _FORMATS if archive.name.endswith(suffix))
    with (
        archive.open("rb") as file,
        tqdm.wrapattr(
            file, "read", total=archive.stat().st_size, desc=f"unpacking {archive.name}", disable=None, leave=False
        ) as stream,
    ):
        yield from (
            _zip_entries(archive, stream) if suffix == ".zip" else _tar_entries(archive, _FORMATS[suffix](stream))
        )


def _zip_entries(archive: Path, stream: Any) -> Iterator[_Entry]:
    with zipfile.ZipFile(stream) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _neither(archive, info.filename)
            if info.is_dir():
                yield _Entry(info.filename, 0, None)
            else:
                with opened.open(info) as content:
                    yield _Entry(info.filename, info.file_size, content)


def _tar_entries(archive: Path, stream: Any) -> Iterator[_Entry]:
    bounded: Any = _Bounded(stream)
    opened: Any
    with tarfile.open(fileobj=bounded, mode="r|") as opened:
        while member := opened.next():
            opened.members = []  # or they would gather
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise _neither(archive, member.name)
            bounded.left = member.size + _BESIDES
            yield _Entry(member.name, member.size if member.isreg() else 0, opened.extractfile(member))
            bounded.left = _BESIDES
    while bounded.read(_BLOCK):  # to its end, where checksums are
        pass
    if any(bounded.last[-1024:]):
        raise EOFError("it has no end")


class _Bounded:
    """A stream of which no more is read than there should be: headers may be a bomb as well."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.left = _BESIDES
        self.last = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"it has more than {_BESIDES} bytes between two files")
        self.last = content or self.last
        return content


def _neither(archive: Path, name: str) -> UserError:
    return UserError(f"{archive} has an entry {name!a}, which is neither a file nor a folder; do not trust it.")
