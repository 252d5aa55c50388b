"""The plan of a run, stored as `plan.json` in the workdir: its steps, to which others are added."""

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax import protocol
from iumad_jax.data import readers
from iumad_jax.data.formats.files import select
from iumad_jax.data.readers.joined import Absent, Joined, reader_of
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError
from iumad_jax.protocol import Act, Step
from iumad_jax.runtime import live
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.storage import write_whole

CHANGEABLE = ("dataset", "train")  # groups of config keys that a step may change
_NAME = "plan.json"


def read(workdir: Path) -> tuple[Step, ...]:
    """Read the plan; it is empty if no run has begun in the workdir.

    Raises:
        UserError: If the file is damaged or cannot be read.
    """
    file = workdir / _NAME
    try:
        steps: tuple[Step, ...] = ()
        for entry in json.loads(file.read_bytes()):
            _check_entry(entry, steps)
            steps += (protocol.next_step(steps, tuple(entry.pop("objects")), **entry),)
        if not steps:
            raise ValueError("it has no step")
        return steps
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is not the plan of a run ({error}); restore it from a backup, or choose another --workdir."
        ) from error


def _check_entry(entry: dict[str, Any], earlier: Sequence[Step]) -> None:
    """Raise ValueError unless an entry of the file is a step that may follow the earlier ones."""
    objects, changes, act = entry["objects"], entry["changes"], entry["act"]
    if act not in get_args(Act):
        raise ValueError(f"a step's act is {act!r}")
    if not isinstance(objects, list) or not objects or not all(isinstance(name, str) for name in objects):
        raise ValueError("a step does not list its objects")
    seen = set(earlier[-1].seen) if earlier else set()
    if act == "learn" and (len(set(objects)) < len(objects) or seen & set(objects)):
        raise ValueError("an object is learned twice")
    if act != "learn" and not seen >= set(objects):
        raise ValueError(f"a step's act is {act!r} for an object that is not learned before")
    known = configs.flat(configs.paper("1-0").to_dict()) if changes else {}
    for key, value in changes.items():
        if key.split(".")[0] not in CHANGEABLE or type(value) is not type(known.get(key)):
            raise ValueError(f"a step changes config.{key} to {value!r}")
    images = [images for splits in entry["images"].values() for images in splits.values()]
    if not all(isinstance(digest, str) for split in images for digest in split.values()):
        raise ValueError("a digest is not a string")


def write(workdir: Path, steps: Sequence[Step]) -> None:
    """Write the plan.

    Raises:
        UserError: If it cannot be written.
    """
    content = [
        {"act": step.act, "objects": step.objects, "changes": dict(step.changes), "images": step.images}
        for step in steps
    ]
    write_whole(workdir / _NAME, (json.dumps(content, indent=1) + "\n").encode())


def begin(config: ConfigDict, workdir: Path, steps: Sequence[Step], step: Step) -> None:
    """Add a step that begins to the plan; until then, its objects may be withdrawn.

    The objects of a protocol other than "open" are all fixed when its first step begins.

    Raises:
        UserError: If another process has planned other steps meanwhile, or the plan cannot be written.
    """
    planned = read(workdir)
    if planned != tuple(steps[: len(planned)]):
        raise UserError(f"{workdir}: another process has added steps to this run; run the command again.")
    count = step.index + 1 if planned or config.protocol == protocol.OPEN else len(steps)
    if len(planned) < count:
        write(workdir, steps[:count])


def current(config: ConfigDict, workdir: Path) -> tuple[Step, ...]:
    """Return the steps of a run: those planned so far, and with the protocol "open" one for each new object.

    Raises:
        UserError: If the plan cannot be read, or a new run's dataset or protocol is invalid.
    """
    steps = read(workdir)
    if not steps:
        return protocol.steps(config.protocol, readers.objects(config))
    if config.protocol != protocol.OPEN or not Path(config.dataset.root).is_dir():
        return steps
    return with_objects(steps, _unlearned(config, steps[-1].seen), {})


def with_objects(steps: tuple[Step, ...], names: Sequence[str], changes: Mapping[str, Any]) -> tuple[Step, ...]:
    """Add one step for each object, which learns it."""
    for name in names:
        steps += (protocol.next_step(steps, (name,), changes),)
    return steps


def changed_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with other values of some keys."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def dataset_of(config: ConfigDict, step: Step) -> ConfigDict:
    """Return the config of the dataset that a step learns from."""
    return changed_config(config, _dataset_changes(step))


def _dataset_changes(step: Step) -> dict[str, Any]:
    return {key: value for key, value in step.changes.items() if key.startswith("dataset.")}


def dataset_flags(config: ConfigDict, dataset: ConfigDict) -> list[str]:
    """List the flags with which a command uses another dataset than that of the run's config."""
    own, other = (configs.flat({"dataset": values.dataset.to_dict()}) for values in (config, dataset))
    return [f"--config.{key}={value}" for key, value in other.items() if value != own[key]]


def retired(steps: Sequence[Step]) -> set[str]:
    """Return the objects that the steps retire and do not restore."""
    names: set[str] = set()
    for step in steps:
        if step.act == "retire":
            names |= set(step.objects)
        elif step.act == "restore":
            names -= set(step.objects)
    return names


def is_same_dataset(step: Step, other: Step) -> bool:
    """Return whether two steps learn from the same dataset."""
    return _dataset_changes(step) == _dataset_changes(other)


def datasets(config: ConfigDict, steps: Sequence[Step]) -> list[tuple[ConfigDict, tuple[str, ...]]]:
    """List the configs of the datasets that objects were learned from, each with these objects."""
    groups = itertools.groupby((step for step in steps if step.learned), _dataset_changes)
    return [(changed_config(config, changes), sum((step.learned for step in group), ())) for changes, group in groups]


def rendered(config: ConfigDict, steps: Sequence[Step]) -> list[ConfigDict]:
    """List the configs of the datasets that the steps use."""
    groups = itertools.groupby((step for step in steps if step.learned or step.images), _dataset_changes)
    return [changed_config(config, changes) for changes, _ in groups]


def open_reader(config: ConfigDict, steps: Sequence[Step], spared: Collection[str] = ()) -> Reader:
    """Open the reader of all objects of a run, in the order of learning.

    An object that was updated with images of another dataset is tested on the test images there, if there are any.

    Args:
        config: Config of the run.
        steps: Steps of the run.
        spared: Objects whose images may be missing. They then have no images.

    Raises:
        UserError: As `readers.open_reader`.
    """
    opened = [*itertools.chain(*(_open(dataset, names, spared) for dataset, names in datasets(config, steps)))]
    if len(opened) == 1 and not any(map(_is_elsewhere, steps)):
        return opened[0]
    by_object = {name: reader for reader in opened for name in reader.objects}
    tests: dict[str, Reader] = {}
    for step in filter(_is_elsewhere, steps):
        for reader in _open(dataset_of(config, step), step.objects, spared):
            tests |= {name: reader for name in reader.objects if reader.ids(name, "test")}
    return Joined(by_object, tests)


def _is_elsewhere(step: Step) -> bool:
    """Return whether a step updates or calibrates objects with images of another dataset."""
    return bool(step.images and _dataset_changes(step))


def _open(dataset: ConfigDict, names: Sequence[str], spared: Collection[str]) -> Iterable[Reader]:
    """Open the reader of a dataset's objects; if it cannot be opened, one for each object, so that some are spared."""
    try:
        return [readers.open_reader(dataset, names)]
    except UserError as error:
        if len(names) > 1 and set(names) & set(spared):
            return itertools.chain(*(_open(dataset, (name,), spared) for name in names))
        if names[0] not in spared:
            raise
        if Path(dataset.dataset.root).is_dir() and names[0] in readers.available(dataset):
            live.log(f"{names[0]} is judged on images that the run kept, because its own cannot be read: {error}")
        return [Absent(names[0])]


def open_learned(config: ConfigDict, workdir: Path, step: int) -> Reader:
    """Open the reader of the objects that a run had learned by a step, in the order of learning.

    Raises:
        UserError: As `read` and `readers.open_reader`.
    """
    return open_reader(config, _until(workdir, step))


def open_for_use(config: ConfigDict, workdir: Path, step: int) -> Reader:
    """Open the reader of the dataset that a trained model is used on.

    Args:
        config: Config of the run, possibly with another dataset. With the run's own, all objects that the run has
            learned are included, from whatever dataset, if they are still there.
        workdir: Workdir of the run.
        step: Step of the run after which the model was saved.

    Raises:
        UserError: As `read` and `readers.open_reader`.
    """
    own = workdirs.read(workdir).dataset
    own.trust = config.dataset.trust  # which makes it no other dataset
    if config.dataset != own:
        return readers.open_reader(config)
    steps = _until(workdir, step)
    seen = steps[-1].seen
    if others := _unlearned(config, seen) if Path(config.dataset.root).is_dir() else ():
        steps.append(protocol.next_step(steps, others, {}))
    reader = open_reader(config, steps, seen)
    names = [name for name in reader.objects if not isinstance(reader_of(reader, name, "train"), Absent)]
    tested = [name for name in reader.objects if reader.ids(name, "test")]
    by_object = {name: reader_of(reader, name, "train") for name in reader.objects if name in {*names, *tested}}
    return Joined(by_object, {name: reader_of(reader, name, "test") for name in tested})


def _unlearned(config: ConfigDict, seen: Sequence[str]) -> tuple[str, ...]:
    """Return the objects that the config selects and that are not among those seen, whose files may be gone."""
    if config.dataset.objects == "all":
        return tuple(name for name in readers.available(config) if name not in seen)
    names = [name.strip() for name in config.dataset.objects.split(",")]
    return select([name for name in names if name not in seen], readers.available(config))


def _until(workdir: Path, step: int) -> list[Step]:
    """Return the steps of a run's plan until a step."""
    steps = read(workdir)[: step + 1]
    if not steps:
        raise UserError(f"{workdir / _NAME} is missing; restore it from a backup.")
    return list(steps)
