"""Lists and checks the files of a dataset without decoding them, and reads its small YAML files."""

import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from iumad_jax.errors import UserError, tell_once

_MAX_YAML_BYTES = 1 << 16
_MAX_YAML_DEPTH = 20

Within = Sequence[Path]  # folders that links may lead into, first the one that is read

_CLUTTER, _ANNOTATIONS = ("thumbs.db", "desktop.ini", "__macosx"), (".json", ".xml")  # names and endings, in lower case
_RESULTS = (  # files, together, that tell a folder of results: of a run, evaluation, prediction or prepared set
    ("config.json", "lock"),
    ("ledger.jsonl",),
    ("predictions.csv", "predictions.json"),
    ("lock", "manifest.json"),
)


def select(
    objects: str | Sequence[str], available: Sequence[str], key: str = "config.dataset.objects"
) -> tuple[str, ...]:
    """Return the object names that a key or flag selects, in the order of learning.

    Args:
        objects: "all", names separated by commas, or a sequence of names.
        available: All objects of the dataset.
        key: The key or flag, for messages.

    Raises:
        UserError: If a name is unknown or occurs twice.
    """
    if objects == "all":
        return tuple(available)
    names = tuple(name.strip() for name in objects.split(",")) if isinstance(objects, str) else tuple(objects)
    for name in names:
        if name not in available:
            if whole := [other for other in available if isinstance(objects, str) and "," in other and name in other]:
                raise UserError(f'{key} divides names at commas; rename "{whole[0]}".')
            raise UserError(f'{key} names "{name}"; choose all or any of {", ".join(available)}.')
        if names.count(name) > 1:
            raise UserError(f"{key} names {name} twice; name it once.")
    return names


@contextmanager
def opening(root: Path) -> Iterator[None]:
    """Check the root of a dataset and turn OSErrors raised in the context into UserErrors.

    Raises:
        UserError: If the root is not a folder, is empty, or a file or folder in it cannot be read.
    """
    try:
        if not root.is_dir():
            place = "" if root.is_absolute() else f" in {Path.cwd()}"
            if root.parts[:1] == ("~",):
                place += " (shells leave ~ behind = as it is: write $HOME)"
            raise UserError(
                f"config.dataset.root is {root}, which is not a folder{place}; choose the dataset's folder with"
                " --config.dataset.root."
            )
        if not any(root.iterdir()):
            raise UserError(f"config.dataset.root is {root}, which is empty; choose the dataset's folder.")
        yield
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error


def is_clutter(name: str) -> bool:
    """Return whether a name is that of a hidden file, of what systems leave in folders, or of a tool's annotation."""
    return name.startswith(".") or name.casefold() in _CLUTTER or name.casefold().endswith(_ANNOTATIONS)


def is_output(folder: Path) -> bool:
    """Return whether a folder holds a run or other results of commands, or folders with results; if so, it is told."""

    def is_result(path: Path) -> bool:
        return any(all((path / name).is_file() for name in names) for names in _RESULTS)

    def holds_results(path: Path) -> bool:
        prepared_sets = (lock.parent for pattern in ("*/lock", "prepared/*/lock") for lock in path.glob(pattern))
        return is_result(path) or any((folder / "manifest.json").is_file() for folder in prepared_sets)

    found = False
    with suppress(OSError), os.scandir(folder) as entries:  # an unreadable folder is reported when it is read
        inner = (entry.is_dir() and holds_results(Path(entry)) for entry in entries if not is_clutter(entry.name))
        found = holds_results(folder) or (any(inner) if folder.name == "runs" else next(inner, False) and all(inner))
    if found:
        tell_once(("output", folder), f"{folder} holds what commands wrote, which is no part of a dataset.")
    return found


def trusted(folders: str) -> tuple[Path, ...]:
    """Return the folders that `config.dataset.trust` names, separated by commas."""
    return tuple(Path(name.strip()) for name in folders.split(",") if name.strip())


def list_entries(folder: Path, within: Within) -> dict[str, os.DirEntry[str]]:
    """List the entries of a folder by name, sorted, without clutter; of a dataset or object without results, too.

    Raises:
        UserError: If the folder or a link in it leads elsewhere than it may, or a name cannot be printed.
        OSError: If the folder cannot be read, or a link in it is broken or leads to itself.
    """
    check_inside(folder, within)
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not is_clutter(entry.name)]
    by_name = {entry.name: entry for entry in sorted(visible, key=lambda entry: entry.name)}
    for name, entry in by_name.items():
        if not name.isprintable():
            raise UserError(f"{folder / name} has a name that cannot be printed; rename it.")
        if entry.is_symlink():
            (folder / name).stat()  # raises OSError for a broken or circular link
            check_inside(folder / name, within)
    if within[0] not in (folder, folder.parent):
        return by_name
    return {name: entry for name, entry in by_name.items() if not (entry.is_dir() and is_output(folder / name))}


def folders(folder: Path, within: Within) -> tuple[str, ...]:
    """List the names of the subfolders of a folder, sorted; for the errors see `list_entries`."""
    return tuple(name for name, entry in list_entries(folder, within).items() if entry.is_dir())


def check_file(entry: os.DirEntry[str]) -> None:
    """Raise UserError unless an entry is a file that is not empty."""
    if not entry.is_file():
        raise UserError(f"{entry.path} is not a file; replace it by one.")
    if entry.stat().st_size == 0:
        raise UserError(f"{entry.path} is empty; replace it.")


def check_inside(path: Path, within: Within) -> None:
    """Raise UserError if a path, with its links resolved, lies in none of the folders that links may lead into."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be followed, since its link leads to itself; remove it.") from error
    if not any(target.is_relative_to(folder.resolve()) for folder in within):
        raise UserError(
            f"{path} leads out of {within[0]} to {target}; replace it by a copy, or trust what is there with"
            f" --config.dataset.trust={target if target.is_dir() else target.parent}."
        )


def read_yaml(file: Path) -> dict[Any, Any]:
    """Read the keys and values of a small YAML file.

    Raises:
        UserError: If the file cannot be read, is too large, is not plain YAML or holds no keys.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_YAML_BYTES + 1)
    except OSError as error:
        raise read_error(file, error) from error
    if len(text) > _MAX_YAML_BYTES:
        raise UserError(f"{file} is larger than {_MAX_YAML_BYTES} bytes; replace it.")
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not plain YAML ({reason}); replace it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no keys; replace it.")
    return content


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses aliases, which can expand beyond any memory, and deep nesting."""

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


def abbreviate(value: Any) -> str:
    """Format a value of a YAML file in at most 40 characters."""
    try:
        return f"{reprlib.repr(value):.40}"
    except ValueError:  # Python refuses to convert integers of thousands of digits to text
        return "a huge number"


def tell(message: str, example: Path) -> None:
    """Tell once what is done with files such as the example."""
    tell_once(message, f"{message} (as in {example}).")


def read_error(file: Path, error: Exception) -> UserError:
    """Return the error for a file that cannot be opened or decoded."""
    reason = (isinstance(error, OSError) and error.strerror) or "it is truncated or damaged"
    return UserError(f"{file} cannot be read ({reason}); replace it.")
