"""Preparations that are interrupted, killed, damaged or out of disk space keep all finished images."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iumad_jax.errors import UserError
from tests import sentences
from tests.data.prepared.sets import (
    RGB,
    SIZE,
    TEST_IMAGES,
    Counting,
    assert_same,
    make_root,
    prepare_afresh,
    prepare_counted,
    store,
)


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


def test_an_interrupted_preparation_is_resumed(root):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_counted(root, "test", interrupted)
    assert not list(root.parent.glob("prepared/*/manifest.json"))
    after, encoded = prepare_counted(root, "test")
    assert encoded == 9  # the first two were kept
    assert_same(after, prepare_afresh(root, "test"))


def prepare_in_a_process(root, then):
    """Start a process that prepares the test images; before the second chunk it dies, or waits for a file."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.data.prepared.test_interruptions", root, then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_preparation_is_resumed(root):
    """The kill leaves an incomplete line in the journal and an incomplete row in an array."""
    with prepare_in_a_process(root, "die") as process:
        assert process.wait() == -signal.SIGKILL
    (journal,) = root.parent.glob("prepared/*/rows-*/journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines)[:-20])
    with journal.with_name("images_rgb.npy").open("r+b") as file:
        file.seek(128 + 2 * SIZE * SIZE * 3)
        file.write(b"half a row")
    after, encoded = prepare_counted(root, "test")
    assert encoded == 10  # the journal describes only one of the first two images
    assert_same(after, prepare_afresh(root, "test"))


def test_two_processes_prepare_at_once(root):
    """The second process waits and reuses the images of the first."""
    with prepare_in_a_process(root, "wait") as first:
        while not any(journal.stat().st_size > 99 for journal in root.parent.glob("prepared/*/rows-*/journal")):
            assert first.poll() is None
            time.sleep(0.01)
        with prepare_in_a_process(root, "wait") as second:
            message = second.stderr.readline()
            assert re.fullmatch(sentences.ANOTHER_PROCESS_PREPARES.format(r"Confetto-test-\w+"), message)
            (root / "go").touch()
            assert first.communicate() == (str(TEST_IMAGES), "")
            assert second.communicate() == ("0", "")
    after, encoded = prepare_counted(root, "test")
    assert encoded == 0
    assert_same(after, prepare_afresh(root, "test"))


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def reformat_header(file):
    """Write an equivalent header with other characters, and damage the first row."""
    file.write_bytes(file.read_bytes().replace(b"'descr': ", b"'descr' :", 1))
    flip(file, 128)


DAMAGE = {
    "a bit of an image": ("images_rgb.npy", lambda file: flip(file, 128 + SIZE * SIZE * 3 * 4 + 77), 1),
    "a bit of the last features": ("features_rgb.npy", lambda file: flip(file, -1), 1),
    "a bit of a mask": ("mask.npy", lambda file: flip(file, 128), 1),
    "a type": ("features_rgb.npy", lambda file: file.write_bytes(file.read_bytes().replace(b"<f2", b"<i2", 1)), 11),
    "a header, and a row": ("anomalous.npy", reformat_header, 11),
    "half a file": ("features_rgb.npy", lambda file: os.truncate(file, file.stat().st_size // 2), 11),
    "an empty file": ("thumbnail.npy", lambda file: os.truncate(file, 0), 11),
    "a missing file": ("height.npy", Path.unlink, 11),
    "a missing folder": ("height.npy", lambda file: shutil.rmtree(file.parent), 11),
    "a letter of the manifest": (
        "../manifest.json",
        lambda file: file.write_text(file.read_text().replace('"defect": "good"', '"defect": "hood"', 1)),
        11,
    ),
    "half a manifest": ("../manifest.json", lambda file: os.truncate(file, 100), 11),
}


@pytest.mark.parametrize(("name", "damage", "lost"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_detected_and_repaired(root, capfd, name, damage, lost):
    before, _ = prepare_counted(root, "test")
    (folder,) = root.parent.glob("prepared/*/rows-*")
    damage(folder / name)
    capfd.readouterr()
    after, encoded = prepare_counted(root, "test")
    assert encoded == lost
    assert_same(after, before)
    messages = capfd.readouterr().err
    if "json" not in name and folder.exists() and lost < 11:
        assert sentences.DAMAGED_IMAGES.format(lost=lost, all=11) in messages
    assert prepare_counted(root, "test")[1] == 0


def test_a_bad_image_prevents_a_set_but_earlier_images_are_kept(root):
    file = root / "Confetto" / "test_public" / "data" / "09_depth.png"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("09_depth.png"))):
        prepare_counted(root, "test")
    assert not list(root.parent.glob("prepared/*/manifest.json"))
    file.write_bytes(content)
    after, encoded = prepare_counted(root, "test")
    assert encoded in (3, 5, 7, 9, 11)  # some pairs of the first eight were encoded before the error
    assert_same(after, prepare_afresh(root, "test"))


@pytest.mark.parametrize("size", [0, 20_000, 100_000, 1_000_000])
def test_a_full_disk_is_reported_and_nothing_is_lost(root, files_no_larger_than, size):
    with (
        files_no_larger_than(size),
        pytest.raises(UserError, match=sentences.PREPARING_WITHOUT_ROOM.format("File too large")),
    ):
        prepare_counted(root, "test")
    assert not list(root.parent.glob("prepared/*/manifest.json"))
    assert_same(prepare_counted(root, "test")[0], prepare_afresh(root, "test"))


if __name__ == "__main__":  # entry point of the other process

    def wait():
        deadline = time.monotonic() + 60
        while not (Path(sys.argv[1]) / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    counting = Counting({"die": lambda: os.kill(os.getpid(), signal.SIGKILL), "wait": wait}[sys.argv[2]])
    store(Path(sys.argv[1]), processing=RGB, encoder=counting).get("Confetto", "test")
    print(counting.images, end="")
