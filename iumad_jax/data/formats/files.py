"""What lies in a dataset's folders, looked at without decoding anything, and its small text files."""

import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from iumad_jax.errors import UserError

_MAX_YAML_BYTES = 1 << 16
_MAX_YAML_DEPTH = 20


def select(objects: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names that `config.dataset.objects` gives, in the order of learning: "all", or some separated by commas.

    They may also be given one by one.

    Raises:
        UserError: a name is unknown or given twice.
    """
    if objects == "all":
        return tuple(known)
    names = tuple(name.strip() for name in objects.split(",")) if isinstance(objects, str) else tuple(objects)
    for name in names:
        if name not in known:
            raise UserError(f'config.dataset.objects names "{name}"; known are all and {", ".join(known)}.')
        if names.count(name) > 1:
            raise UserError(f"config.dataset.objects names {name} twice; name it once.")
    return names


@contextmanager
def opening(root: Path) -> Iterator[None]:
    """Around all that looks at a dataset's folders: the root must be one, and what the system refuses is told.

    Raises:
        UserError: the root is not a folder or empty, or something in it cannot be read.
    """
    try:
        if not root.is_dir():
            raise UserError(f"config.dataset.root is {root}, which is not a folder; name the dataset's.")
        if not any(root.iterdir()):
            raise UserError(f"config.dataset.root is {root}, which is empty; name the dataset's folder.")
        yield
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error


def listing(folder: Path, root: Path) -> dict[str, os.DirEntry[str]]:
    """What a folder holds, by name, sorted, without hidden files.

    Raises:
        UserError: the folder or a link in it leads out of the root, or a name cannot be printed.
        OSError: it cannot be read, or a link leads nowhere but to itself.
    """
    _check_inside(folder, root)
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in sorted(entries, key=lambda one: one.name) if entry.name[0] != "."}
    for name, entry in found.items():
        if not name.isprintable():
            raise UserError(f"{folder / name} has a name that cannot be printed; rename it.")
        if entry.is_symlink():
            (folder / name).stat()
            _check_inside(folder / name, root)
    return found


def folders(folder: Path, root: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted; see `listing`."""
    return tuple(name for name, entry in listing(folder, root).items() if entry.is_dir())


def check_file(entry: os.DirEntry[str]) -> None:
    """Raises UserError for what is not a file, or an empty one."""
    if not entry.is_file():
        raise UserError(f"{entry.path} is not a file; restore it.")
    if entry.stat().st_size == 0:
        raise UserError(f"{entry.path} is empty; restore it.")


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{path} leads out of config.dataset.root to {path.resolve()}; put a copy in its place.")


def read_yaml(file: Path) -> dict[Any, Any]:
    """The keys of a small YAML file.

    Raises:
        UserError: it cannot be read, is no plain YAML or holds no keys.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_YAML_BYTES + 1)
    except OSError as error:
        raise unreadable(file, error) from error
    if len(text) > _MAX_YAML_BYTES:
        raise UserError(f"{file} is larger than {_MAX_YAML_BYTES} bytes; restore it.")
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not plain YAML ({reason}); restore it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no keys; restore it.")
    return content


class _Loader(yaml.SafeLoader):
    """Without aliases, a few of which can stand for more than any memory holds, and without much nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        if self.depth == _MAX_YAML_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def shown(value: Any) -> str:
    """A value of such a file, in few characters."""
    try:
        return f"{reprlib.repr(value):.40}"
    except ValueError:  # Python does not write numbers of more than some thousand digits
        return "a huge number"


def unreadable(file: Path, error: Exception) -> UserError:
    """The sentence for a file that cannot be opened or decoded."""
    reason = (isinstance(error, OSError) and error.strerror) or "it is truncated or damaged"
    return UserError(f"{file} cannot be read ({reason}); restore it.")
