"""Images that arrive in a folder."""

import functools
import os
import threading

import numpy as np
from PIL import Image

from iumad_jax.data.readers import unlabelled
from iumad_jax.data.readers.watching import watch
from iumad_jax.data.sample import DepthFormat


def looking(root, depth=None):
    settings = depth is not None, depth, DepthFormat(0.001), None
    return functools.partial(unlabelled.photographs, root, *settings, may_be_empty=True)


def next_images(images):
    """Return the names that one look at the folder yields."""
    return [image.name for image in iter(functools.partial(next, images), None)]


def save(file, level=100):
    file.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.full((8, 9, 3), level, np.uint8)).save(file)


def test_images_are_yielded_once_they_are_complete(tmp_path):
    images = watch(looking(tmp_path), threading.Event())
    assert next_images(images) == []
    save(tmp_path / "b.png")
    save(tmp_path / "sub" / "a.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    assert next_images(images) == []  # may still be written
    assert next_images(images) == ["b", "sub/a"]
    assert next_images(images) == []
    content = (tmp_path / "b.png").read_bytes()
    growing = (tmp_path / "growing.png").open("wb", buffering=0)
    assert [next_images(images), next_images(images)] == [[], []]  # an empty file is not complete
    for byte in (content[:10], content[10:20]):
        growing.write(byte)
        assert next_images(images) == []
    growing.write(content[20:])
    growing.close()
    assert [next_images(images), next_images(images), next_images(images)] == [[], ["growing"], []]


def test_a_changed_image_is_yielded_again_and_a_removed_one_is_forgotten(tmp_path):
    save(tmp_path / "a.png")
    images = watch(looking(tmp_path), threading.Event())
    assert [next_images(images), next_images(images)] == [[], ["a"]]
    save(tmp_path / "a.png", level=7)
    os.utime(tmp_path / "a.png", ns=(1, 1))  # in case both were written within one tick of the clock
    assert next_images(images) == []
    image = next(images)
    assert (image.name, image.read()[0].max()) == ("a", 7)
    (tmp_path / "a.png").unlink()
    assert [next_images(images), next_images(images)] == [[], []]


def test_an_image_waits_for_its_depth(tmp_path):
    save(tmp_path / "rgb" / "a.png")
    (tmp_path / "depth").mkdir()
    images = watch(looking(tmp_path / "rgb", tmp_path / "depth"), threading.Event())
    assert [next_images(images), next_images(images)] == [[], []]
    np.save(tmp_path / "depth" / "a.npy", np.full((8, 9), 500.0))
    assert [next_images(images), next_images(images)] == [[], ["a"]]


def test_it_ends_when_stopped(tmp_path):
    stopped = threading.Event()
    images = watch(looking(tmp_path), stopped)
    assert next(images) is None
    stopped.set()
    assert list(images) == []
