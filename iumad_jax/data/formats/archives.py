"""Unpacks untrusted dataset archives: only files and folders, into a new folder, within size limits."""

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
_MAX_HEADER_BYTES = 1 << 20  # allowed in a .tar between the contents of two files
_BLOCK = 1 << 20
_MAX_DEPTH = 32  # nested folders
_RECORD = ".archive.json"  # names the source archive in the unpacked folder
_DAMAGE_ERRORS = (
    EOFError,
    LookupError,
    NotImplementedError,  # raised, like the following, by the libraries for damaged archives
    RuntimeError,
    ValueError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


class Limits(NamedTuple):
    """Upper limits for the unpacked content."""

    bytes: int
    entries: int


class _Entry(NamedTuple):
    name: str
    size: int
    content: Any  # binary stream; None for a folder


def unpack(archive: Path, root: Path, limits: Limits) -> str:
    """Unpack a .tar, .tar.gz, .tar.xz or .zip into a new folder, completely or not at all.

    The next call removes the files of an interrupted call. An existing folder of this archive is left unchanged.

    Returns:
        The archive's SHA-256.

    Raises:
        UserError: If the folder has other content or cannot be written, or if the archive has an unsupported format,
            is truncated or damaged, exceeds the limits, or has an entry that is neither a file nor a folder, leads
            outside or too deep, or occurs twice.
    """
    if not archive.name.endswith(tuple(_FORMATS)):
        raise UserError(f"--archive is {archive}; use a file that ends in {', '.join(_FORMATS)}.")
    try:
        with archive.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"--archive is {archive}, which cannot be read ({error.strerror}); choose another file."
        ) from error
    unfinished = root.with_name(root.name + ".unpacking")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with locked(root.with_name(root.name + ".lock"), f"{root}: waiting for another process to unpack it."):
            if root.exists() and any(root.iterdir()):
                if _recorded_sha256(root) != sha256:
                    raise UserError(
                        f"config.dataset.root is {root}, which is not empty and was not unpacked from {archive.name};"
                        " omit --archive or choose a new folder."
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
    except _DAMAGE_ERRORS as error:
        raise UserError(f"{archive} is truncated or damaged ({error}); download it again.") from error
    except OSError as error:
        raise UserError(
            f"{archive} cannot be unpacked to {root} ({error.strerror}), so nothing was kept;"
            " make room or choose another folder."
        ) from error
    return sha256


def _recorded_sha256(root: Path) -> str | None:
    """Read the SHA-256 of the archive that a folder was unpacked from; None without a valid record."""
    try:
        return json.loads((root / _RECORD).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(archive: Path, folder: Path, limits: Limits) -> None:
    """Write the entries of an archive into a folder; owners, permissions and times are the system's defaults."""
    size = 0
    for number, entry in enumerate(_entries(archive), 1):
        size += entry.size
        if number > limits.entries:
            raise UserError(f"{archive} has more than {limits.entries} entries; raise --archive_entries.")
        if size > limits.bytes:
            raise UserError(f"{archive} unpacks to more than {limits.bytes / 1e9:g} GB; raise --archive_gb.")
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts or len(path.parts) > _MAX_DEPTH:
            raise UserError(f"{archive} has an entry {entry.name!a}, which leads outside or too deep; do not trust it.")
        try:
            if entry.content is None:
                (folder / path).mkdir(parents=True, exist_ok=True)
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("xb") as file:
                remaining = entry.size
                while block := entry.content.read(min(remaining, _BLOCK) if remaining else 1):
                    remaining -= len(block)
                    if remaining < 0:
                        raise ValueError(f"{entry.name!a} is longer than its header states")
                    file.write(block)
                if remaining:
                    raise EOFError(f"{entry.name!a} ends too early")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                f"{archive} has an entry {entry.name!a} that collides with another entry; do not trust it."
            ) from error


def _entries(archive: Path) -> Iterator[_Entry]:
    """Yield every file and folder; the content of a file must be read before the next entry is requested."""
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
    with zipfile.ZipFile(stream) as zip_file:
        for info in zip_file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _wrong_type(archive, info.filename)
            if info.is_dir():
                yield _Entry(info.filename, 0, None)
            else:
                with zip_file.open(info) as content:
                    yield _Entry(info.filename, info.file_size, content)


def _tar_entries(archive: Path, stream: Any) -> Iterator[_Entry]:
    bounded: Any = _Bounded(stream)
    tar: Any
    with tarfile.open(fileobj=bounded, mode="r|") as tar:
        while member := tar.next():
            tar.members = []  # the list would grow with every entry
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise _wrong_type(archive, member.name)
            bounded.remaining = member.size + _MAX_HEADER_BYTES
            yield _Entry(member.name, member.size if member.isreg() else 0, tar.extractfile(member))
            bounded.remaining = _MAX_HEADER_BYTES
    while bounded.read(_BLOCK):  # read to the end, which verifies the compression's checksums
        pass
    if any(bounded.last[-1024:]):
        raise EOFError("its end is missing")


class _Bounded:
    """Stream that limits the bytes between two files, since headers can be decompression bombs, too."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.remaining = _MAX_HEADER_BYTES
        self.last = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.remaining -= len(content)
        if self.remaining < 0:
            raise ValueError(f"it has more than {_MAX_HEADER_BYTES} bytes between two files")
        self.last = content or self.last
        return content


def _wrong_type(archive: Path, name: str) -> UserError:
    return UserError(f"{archive} has an entry {name!a}, which is neither a file nor a folder; do not trust it.")
