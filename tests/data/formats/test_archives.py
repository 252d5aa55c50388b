"""Archives as they should be, and as nobody should trust them: written by the standard library, byte by byte where it
refuses to."""

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
    """A tar of (TarInfo, content), compressed as its name says."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(plain.getvalue()))
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


def holds(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_went_in_comes_out(tmp_path, kind):
    archive = write(tmp_path / f"a.{kind}", FILES.items())
    root = tmp_path / "data" / "root"
    expected = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert unpack(archive, root, LIMITS) == expected
    assert holds(root) == FILES
    assert {path.name for path in root.parent.iterdir()} == {"root", "root.lock"}
    (root / "readme.txt").write_text("mine")
    assert unpack(archive, root, LIMITS) == expected  # once is enough
    assert (root / "readme.txt").read_text() == "mine"


@pytest.mark.parametrize("inside", ["another archive", "something else"])
def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, inside):
    root = tmp_path / "root"
    if inside == "another archive":
        unpack(write(tmp_path / "a.tar", [("a", b"")]), root, LIMITS)
    else:
        root.mkdir()
        (root / "a").touch()
    with pytest.raises(
        UserError, match=re.escape(sentences.ARCHIVE_ROOT_NOT_EMPTY.format(root="root", archive="b.tar"))
    ):
        unpack(write(tmp_path / "b.tar", [("b", b"")]), root, LIMITS)
    assert holds(root) == {"a": b""}


HOSTILE = {
    "a way out": (lambda p: write_tar(p, [member("../out")]), sentences.ARCHIVE_LEADS_ELSEWHERE.format("'../out'")),
    "a way out within": (lambda p: write_tar(p, [member("a/../../out")]), sentences.ARCHIVE_LEADS_ELSEWHERE.format("")),
    "an absolute path": (
        lambda p: write_tar(p, [member("/tmp/out")]),
        sentences.ARCHIVE_LEADS_ELSEWHERE.format("'/tmp/out'"),
    ),
    "a deep path": (lambda p: write_tar(p, [member("a/" * 40 + "out")]), sentences.ARCHIVE_LEADS_ELSEWHERE.format("")),
    "a symbolic link": (
        lambda p: write_tar(p, [member("link", kind=tarfile.SYMTYPE, linkname="/tmp"), member("link/out")]),
        sentences.ARCHIVE_HOLDS_NO_FILE.format("'link'"),
    ),
    "a hard link": (
        lambda p: write_tar(p, [member("l", kind=tarfile.LNKTYPE, linkname="../x")]),
        sentences.ARCHIVE_HOLDS_NO_FILE.format(""),
    ),
    "a device": (
        lambda p: write_tar(p, [member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)]),
        sentences.ARCHIVE_HOLDS_NO_FILE.format(""),
    ),
    "a pipe": (
        lambda p: write_tar(p, [member("pipe", kind=tarfile.FIFOTYPE)]),
        sentences.ARCHIVE_HOLDS_NO_FILE.format(""),
    ),
    "a file twice": (
        lambda p: write_tar(p, [member("a", b"1"), member("a", b"2")]),
        sentences.ARCHIVE_HOLDS_IT_TWICE.format("'a'"),
    ),
    "a file as a folder": (
        lambda p: write_tar(p, [member("a"), member("a/b")]),
        sentences.ARCHIVE_HOLDS_IT_TWICE.format("'a/b'"),
    ),
    "a file in the folder's place": (
        lambda p: write_tar(p, [member(".")]),
        sentences.ARCHIVE_HOLDS_IT_TWICE.format("'.'"),
    ),
    "too many entries": (
        lambda p: write_tar(p, [member(str(i)) for i in range(101)]),
        sentences.ARCHIVE_OF_TOO_MANY.format(100),
    ),
    "a bomb": (lambda p: write_tar(p, [member("a", bytes(10**6 + 1))]), sentences.ARCHIVE_TOO_LARGE.format(0.001)),
    "a bomb of many": (
        lambda p: write_tar(p, [member(str(i), bytes(10**5)) for i in range(11)]),
        sentences.ARCHIVE_TOO_LARGE.format(0.001),
    ),
    "a bomb of a second header": (
        lambda p: write_tar(p, [member("a"), member("b", pax_headers={"comment": "x" * (3 << 20)})]),
        sentences.ARCHIVE_HEADER_TOO_LARGE.format(1048576),
    ),
    "a bomb of a header": (
        lambda p: write_tar(p, [member("a", pax_headers={"comment": "x" * (3 << 20)})]),
        sentences.ARCHIVE_HEADER_TOO_LARGE.format(1048576),
    ),
}


def refused(archive, folder, told):
    """Nothing is left, inside the folder or beside it."""
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match=told) as error:
        unpack(archive, folder / "root", LIMITS)
    assert "\n" not in str(error.value)
    assert {path.name for path in folder.iterdir()} == before | {"root.lock"}


@pytest.mark.parametrize("kind", ["tar", "tar.xz"])
@pytest.mark.parametrize(("make", "told"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tars_are_refused(tmp_path, kind, make, told):
    refused(make(tmp_path / f"a.{kind}"), tmp_path, told)


HOSTILE_ZIPS = {
    "a way out": ([("../out", b"")], 0, sentences.ARCHIVE_LEADS_ELSEWHERE.format("")),
    "an absolute path": ([("/tmp/out", b"")], 0, sentences.ARCHIVE_LEADS_ELSEWHERE.format("")),
    "a symbolic link": ([("link", b"/tmp")], stat.S_IFLNK | 0o777, sentences.ARCHIVE_HOLDS_NO_FILE.format("")),
    "a device": ([("null", b"")], stat.S_IFCHR, sentences.ARCHIVE_HOLDS_NO_FILE.format("")),
    "a bomb": ([("a", bytes(10**6 + 1))], 0, sentences.ARCHIVE_TOO_LARGE.format(0.001)),
    "too many entries": ([(str(i), b"") for i in range(101)], 0, sentences.ARCHIVE_OF_TOO_MANY.format(100)),
}


@pytest.mark.parametrize(("files", "mode", "told"), HOSTILE_ZIPS.values(), ids=HOSTILE_ZIPS)
def test_hostile_zips_are_refused(tmp_path, files, mode, told):
    refused(write_zip(tmp_path / "a.zip", files, mode), tmp_path, told)


@pytest.mark.parametrize("told", [1000, 3000])
def test_a_zip_that_lies_about_a_size_is_refused(tmp_path, told):
    archive = write_zip(tmp_path / "a.zip", [("a", bytes(2000))])
    archive.write_bytes(archive.read_bytes().replace((2000).to_bytes(4, "little"), told.to_bytes(4, "little")))
    refused(archive, tmp_path, sentences.ARCHIVE_DAMAGED)


def test_a_zip_with_an_entry_without_a_name_is_refused(tmp_path):
    told = (
        sentences.ARCHIVE_HOLDS_IT_TWICE.format("''") if sys.version_info >= (3, 13) else sentences.ARCHIVE_DAMAGED
    )  # by zipfile
    refused(write_zip(tmp_path / "a.zip", [("", b"")]), tmp_path, told)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep", [0, 0.1, 0.3, 0.5])  # a .tar is padded to twice its size
def test_truncated_archives_are_refused(tmp_path, kind, keep):
    noise = [(name, os.urandom(3000)) for name in FILES]
    archive = write(tmp_path / f"a.{kind}", noise)
    os.truncate(archive, int(archive.stat().st_size * keep))
    refused(archive, tmp_path, sentences.ARCHIVE_DAMAGED_SINCE)


def test_a_tar_cut_between_two_files_is_refused(tmp_path):
    archive = write_tar(tmp_path / "a.tar", [member("a", bytes(range(256)) * 2), member("b")])
    os.truncate(archive, 1024)
    refused(archive, tmp_path, sentences.ARCHIVE_WITHOUT_END)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip"])
def test_flipped_bits_are_noticed(tmp_path, kind):
    archive = write(tmp_path / f"a.{kind}", [("a", os.urandom(5000))])
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 16
    archive.write_bytes(content)
    refused(archive, tmp_path, sentences.ARCHIVE_DAMAGED)


@pytest.mark.parametrize("name", ["a.rar", "a.tar.bz2", "a"])
def test_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=sentences.UNKNOWN_ARCHIVE_FORMAT.format(r"\.tar, \.tar\.gz, \.tar\.xz, \.zip")):
        unpack(tmp_path / name, tmp_path / "root", LIMITS)


def test_no_archive(tmp_path):
    told = sentences.ARCHIVE_UNREADABLE.format(archive=tmp_path / "a.tar", reason="No such file or directory")
    with pytest.raises(UserError, match=re.escape(told)):
        unpack(tmp_path / "a.tar", tmp_path / "root", LIMITS)


def test_a_full_disk(tmp_path, files_no_larger_than):
    archive = write(tmp_path / "a.tar", FILES.items())
    with files_no_larger_than(1000):
        refused(archive, tmp_path, sentences.ARCHIVE_NOT_UNPACKED.format(root="root", reason="File too large"))


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
    assert len(holds(tmp_path / "root")) == 5_000
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "root", "root.lock"}
