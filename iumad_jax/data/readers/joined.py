"""Reader of objects that come from several datasets."""

from collections.abc import Sequence
from pathlib import Path

from iumad_jax.data.sample import Reader, Sample, Split


class Joined:
    """Reader that passes each object to the reader of its dataset. Settings of depth are those of the first reader."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        first, *_ = readers
        self.by_object = {name: reader for reader in readers for name in reader.objects}
        self.objects = tuple(self.by_object)
        self.object_height, self.height_range = first.object_height, first.height_range
        self.normals_window, self.depth_format = first.normals_window, first.depth_format

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the sample ids of one object and split."""
        return self.by_object[object].ids(object, split)

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files that a sample is read from."""
        return self.by_object[object].files(object, split, id)

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample."""
        return self.by_object[object].read(object, split, id)


def reader_of(reader: Reader, object: str) -> Reader:
    """Return the reader of an object's own dataset."""
    return reader.by_object[object] if isinstance(reader, Joined) else reader
