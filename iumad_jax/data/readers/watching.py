"""Yields the images of a folder as they arrive, for cameras that write photographs to it."""

import threading
from collections.abc import Callable, Iterable, Iterator

from iumad_jax.data.readers.unlabelled import InputImage
from iumad_jax.errors import UserError

_PAUSE = 0.2  # seconds between two looks at the folder

_State = tuple[tuple[int, int], ...]  # size and time of change of each file


def watch(look: Callable[[], Iterable[InputImage]], stopped: threading.Event) -> Iterator[InputImage | None]:
    """Yield each image once its files are complete, and again if they change; None when there is no other at present.

    A file is complete when it has not changed from one look to the next.

    Args:
        look: Lists the images that are there now.
        stopped: Ends the iteration when set.
    """
    before: dict[str, _State] = {}
    yielded: dict[str, _State] = {}
    while not stopped.is_set():
        now = {}
        for image in look():
            if state := _state(image):
                now[image.name] = state
                if before.get(image.name) == state != yielded.get(image.name):
                    yielded[image.name] = state
                    yield image
        before = now
        yield None
        stopped.wait(_PAUSE)


def _state(image: InputImage) -> _State | None:
    """Return the state of an image's files; None while one is missing or empty."""
    try:
        found = [file.stat() for file in image.files() if file is not None]
    except (OSError, UserError):
        return None
    return tuple((file.st_size, file.st_mtime_ns) for file in found) if all(file.st_size for file in found) else None
