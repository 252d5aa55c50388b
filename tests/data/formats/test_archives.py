"""Unpacking of valid, damaged and hostile archives."""

import gzip
import hashlib
import io
import lzma
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

from iumad_jax.data.formats.archives import Limits, unpack
from iumad_jax.errors import UserError
from tests import sentences

LIMITS = Limits(bytes=10**6, entries=100)
FILES = {"bagel/train/good/rgb/000.png": b"pixels" * 1000, "readme.txt": b"", "peach Ω/a b.txt": b"text"}
FORMATS = ("tar", "tar.gz", "tar.xz", "zip")


def member(name, content=b"", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def write_tar(path, members):
    """Write a tar of (TarInfo, content), compressed according to its suffix."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(plain.getvalue()))
    return path


def write_zip(path, files, mode=0):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def write(path, files):
    if path.suffix == ".zip":
        return write_zip(path, [("bagel/", b""), *files])
    return write_tar(path, [member("./", kind=tarfile.DIRTYPE), *(member(*file) for file in files)])


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.parametrize("kind", FORMATS)
def test_unpacked_files_equal_the_archived_files(tmp_path, kind):
    archive = write(tmp_path / f"a.{kind}", FILES.items())
    root = tmp_path / "data" / "root"
    expected = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert unpack(archive, root, LIMITS) == expected
    assert contents(root) == FILES
    assert {path.name for path in root.parent.iterdir()} == {"root", "root.lock"}
    (root / "readme.txt").write_text("edited")
    assert unpack(archive, root, LIMITS) == expected  # not unpacked again
    assert (root / "readme.txt").read_text() == "edited"


@pytest.mark.parametrize("content", ["another archive", "another file"])
def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, content):
    root = tmp_path / "root"
    if content == "another archive":
        unpack(write(tmp_path / "a.tar", [("a", b"")]), root, LIMITS)
    else:
        root.mkdir()
        (root / "a").touch()
    with pytest.raises(
        UserError, match=re.escape(sentences.ARCHIVE_ROOT_NOT_EMPTY.format(root="root", archive="b.tar"))
    ):
        unpack(write(tmp_path / "b.tar", [("b", b"")]), root, LIMITS)
    assert contents(root) == {"a": b""}


HOSTILE = {
    "a way out": (lambda p: write_tar(p, [member("../out")]), sentences.ARCHIVE_ENTRY_OUTSIDE.format("'../out'")),
    "a way out within": (lambda p: write_tar(p, [member("a/../../out")]), sentences.ARCHIVE_ENTRY_OUTSIDE.format("")),
    "an absolute path": (
        lambda p: write_tar(p, [member("/tmp/out")]),
        sentences.ARCHIVE_ENTRY_OUTSIDE.format("'/tmp/out'"),
    ),
    "a deep path": (lambda p: write_tar(p, [member("a/" * 40 + "out")]), sentences.ARCHIVE_ENTRY_OUTSIDE.format("")),
    "a symbolic link": (
        lambda p: write_tar(p, [member("link", kind=tarfile.SYMTYPE, linkname="/tmp"), member("link/out")]),
        sentences.ARCHIVE_ENTRY_NOT_A_FILE.format("'link'"),
    ),
    "a hard link": (
        lambda p: write_tar(p, [member("l", kind=tarfile.LNKTYPE, linkname="../x")]),
        sentences.ARCHIVE_ENTRY_NOT_A_FILE.format(""),
    ),
    "a device": (
        lambda p: write_tar(p, [member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)]),
        sentences.ARCHIVE_ENTRY_NOT_A_FILE.format(""),
    ),
    "a pipe": (
        lambda p: write_tar(p, [member("pipe", kind=tarfile.FIFOTYPE)]),
        sentences.ARCHIVE_ENTRY_NOT_A_FILE.format(""),
    ),
    "a file twice": (
        lambda p: write_tar(p, [member("a", b"1"), member("a", b"2")]),
        sentences.ARCHIVE_ENTRIES_COLLIDE.format("'a'"),
    ),
    "a file as a folder": (
        lambda p: write_tar(p, [member("a"), member("a/b")]),
        sentences.ARCHIVE_ENTRIES_COLLIDE.format("'a/b'"),
    ),
    "a file in the folder's place": (
        lambda p: write_tar(p, [member(".")]),
        sentences.ARCHIVE_ENTRIES_COLLIDE.format("'.'"),
    ),
    "too many entries": (
        lambda p: write_tar(p, [member(str(i)) for i in range(101)]),
        sentences.ARCHIVE_WITH_TOO_MANY_ENTRIES.format(100),
    ),
    "a bomb": (lambda p: write_tar(p, [member("a", bytes(10**6 + 1))]), sentences.ARCHIVE_TOO_LARGE.format(0.001)),
    "a bomb of many files": (
        lambda p: write_tar(p, [member(str(i), bytes(10**5)) for i in range(11)]),
        sentences.ARCHIVE_TOO_LARGE.format(0.001),
    ),
    "a bomb in the second header": (
        lambda p: write_tar(p, [member("a"), member("b", pax_headers={"comment": "x" * (3 << 20)})]),
        sentences.ARCHIVE_HEADER_TOO_LARGE.format(1048576),
    ),
    "a bomb in the first header": (
        lambda p: write_tar(p, [member("a", pax_headers={"comment": "x" * (3 << 20)})]),
        sentences.ARCHIVE_HEADER_TOO_LARGE.format(1048576),
    ),
}


def assert_refused(archive, folder, expected):
    """Assert that an archive is refused and that nothing is left in or beside the target folder."""
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match=expected) as error:
        unpack(archive, folder / "root", LIMITS)
    assert "\n" not in str(error.value)
    assert {path.name for path in folder.iterdir()} == before | {"root.lock"}


@pytest.mark.parametrize("kind", ["tar", "tar.xz"])
@pytest.mark.parametrize(("make", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tars_are_refused(tmp_path, kind, make, expected):
    assert_refused(make(tmp_path / f"a.{kind}"), tmp_path, expected)


HOSTILE_ZIPS = {
    "a way out": ([("../out", b"")], 0, sentences.ARCHIVE_ENTRY_OUTSIDE.format("")),
    "an absolute path": ([("/tmp/out", b"")], 0, sentences.ARCHIVE_ENTRY_OUTSIDE.format("")),
    "a symbolic link": ([("link", b"/tmp")], stat.S_IFLNK | 0o777, sentences.ARCHIVE_ENTRY_NOT_A_FILE.format("")),
    "a device": ([("null", b"")], stat.S_IFCHR, sentences.ARCHIVE_ENTRY_NOT_A_FILE.format("")),
    "a bomb": ([("a", bytes(10**6 + 1))], 0, sentences.ARCHIVE_TOO_LARGE.format(0.001)),
    "too many entries": ([(str(i), b"") for i in range(101)], 0, sentences.ARCHIVE_WITH_TOO_MANY_ENTRIES.format(100)),
}


@pytest.mark.parametrize(("files", "mode", "expected"), HOSTILE_ZIPS.values(), ids=HOSTILE_ZIPS)
def test_hostile_zips_are_refused(tmp_path, files, mode, expected):
    assert_refused(write_zip(tmp_path / "a.zip", files, mode), tmp_path, expected)


@pytest.mark.parametrize("false_size", [1000, 3000])
def test_a_zip_with_a_false_size_is_refused(tmp_path, false_size):
    archive = write_zip(tmp_path / "a.zip", [("a", bytes(2000))])
    archive.write_bytes(archive.read_bytes().replace((2000).to_bytes(4, "little"), false_size.to_bytes(4, "little")))
    assert_refused(archive, tmp_path, sentences.ARCHIVE_DAMAGED)


def test_a_zip_with_an_entry_without_a_name_is_refused(tmp_path):
    expected = (
        sentences.ARCHIVE_ENTRIES_COLLIDE.format("''") if sys.version_info >= (3, 12) else sentences.ARCHIVE_DAMAGED
    )  # by zipfile
    assert_refused(write_zip(tmp_path / "a.zip", [("", b"")]), tmp_path, expected)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep", [0, 0.1, 0.3, 0.5])  # a .tar is padded to twice its size
def test_truncated_archives_are_refused(tmp_path, kind, keep):
    noise = [(name, os.urandom(3000)) for name in FILES]
    archive = write(tmp_path / f"a.{kind}", noise)
    os.truncate(archive, int(archive.stat().st_size * keep))
    assert_refused(archive, tmp_path, sentences.ARCHIVE_DAMAGED_WITH_REASON)


def test_a_tar_cut_between_two_files_is_refused(tmp_path):
    archive = write_tar(tmp_path / "a.tar", [member("a", bytes(range(256)) * 2), member("b")])
    os.truncate(archive, 1024)
    assert_refused(archive, tmp_path, sentences.ARCHIVE_WITHOUT_END)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip"])
def test_flipped_bits_are_noticed(tmp_path, kind):
    archive = write(tmp_path / f"a.{kind}", [("a", os.urandom(5000))])
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 16
    archive.write_bytes(content)
    assert_refused(archive, tmp_path, sentences.ARCHIVE_DAMAGED)


@pytest.mark.parametrize("name", ["a.rar", "a.tar.bz2", "a"])
def test_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=sentences.UNKNOWN_ARCHIVE_FORMAT.format(r"\.tar, \.tar\.gz, \.tar\.xz, \.zip")):
        unpack(tmp_path / name, tmp_path / "root", LIMITS)


def test_a_missing_archive_is_refused(tmp_path):
    expected = sentences.ARCHIVE_UNREADABLE.format(archive=tmp_path / "a.tar", reason="No such file or directory")
    with pytest.raises(UserError, match=re.escape(expected)):
        unpack(tmp_path / "a.tar", tmp_path / "root", LIMITS)


def test_nothing_is_left_on_a_full_disk(tmp_path, files_no_larger_than):
    archive = write(tmp_path / "a.tar", FILES.items())
    with files_no_larger_than(1000):
        assert_refused(archive, tmp_path, sentences.ARCHIVE_NOT_UNPACKED.format(root="root", reason="File too large"))


def test_a_killed_unpacking_starts_again(tmp_path):
    archive = write(tmp_path / "a.tar", [(str(i), b"") for i in range(5_000)])
    limits = Limits(10**6, 10**5)
    program = (
        "import sys, pathlib; from iumad_jax.data.formats.archives import Limits, unpack;"
        f"unpack(*map(pathlib.Path, sys.argv[1:]), Limits{tuple(limits)})"
    )
    command = [sys.executable, "-c", program, archive, tmp_path / "root"]
    with subprocess.Popen(command) as process:
        while not (tmp_path / "root.unpacking" / "3").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "root.unpacking").exists()
    assert not (tmp_path / "root").exists()
    unpack(archive, tmp_path / "root", limits)
    assert len(contents(tmp_path / "root")) == 5_000
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "root", "root.lock"}
