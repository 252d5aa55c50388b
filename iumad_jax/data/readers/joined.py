"""Readers of objects that come from several datasets, or of which only some images are read."""

from collections.abc import Mapping
from pathlib import Path

from iumad_jax.data.sample import DepthFormat, Reader, Sample, Split
from iumad_jax.errors import UserError
from iumad_jax.protocol import Images


class Joined:
    """Reader that passes each object to its own reader, or for test images to another one.

    Settings of depth are those of the first that has images.
    """

    def __init__(self, by_object: Mapping[str, Reader], tests: Mapping[str, Reader] | None = None) -> None:
        self.by_object, self.tests = dict(by_object), dict(tests or {})
        self.objects = tuple(by_object)
        first, *_ = sorted(by_object.values(), key=lambda reader: isinstance(reader, Absent))
        self.object_height, self.height_range = first.object_height, first.height_range
        self.normals_window, self.depth_format = first.normals_window, first.depth_format

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the sample ids of one object and split."""
        return self.of(object, split).ids(object, split)

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files that a sample is read from."""
        return self.of(object, split).files(object, split, id)

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample."""
        return self.of(object, split).read(object, split, id)

    def of(self, object: str, split: Split) -> Reader:
        """Return the reader of the images of one object and split."""
        return self.tests.get(object, self.by_object[object]) if split == "test" else self.by_object[object]


class Absent:
    """Reader of an object without images."""

    object_height, height_range, normals_window, depth_format = 0.0, 0.0, 3, DepthFormat()

    def __init__(self, object: str) -> None:
        self.objects = (object,)

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """Return no ids."""
        return ()

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """Return no files."""
        return ()

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Raise UserError."""
        raise UserError(f"{object} has no images; restore them.")


class Selected:
    """Reader of some training and calibration images, out of those that another reader reads."""

    def __init__(self, reader: Reader, objects: tuple[str, ...], images: Images) -> None:
        """Select images, the digests of which are listed by object, split and id; `objects` are all of the run."""
        self.reader, self.objects, self.images = reader, objects, images
        self.object_height, self.height_range = reader.object_height, reader.height_range
        self.normals_window, self.depth_format = reader.normals_window, reader.depth_format

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the ids of the selected images of one object and split."""
        return tuple(self.images.get(object, {}).get(split, ()))

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files that a sample is read from."""
        return self.reader.files(object, split, id)

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample."""
        return self.reader.read(object, split, id)


def reader_of(reader: Reader, object: str, split: Split) -> Reader:
    """Return the reader of the dataset that the images of an object and split come from."""
    while isinstance(reader, Joined | Selected):
        reader = reader.of(object, split) if isinstance(reader, Joined) else reader.reader
    return reader
