"""The plan of a run, stored as `plan.json` in the workdir: its steps, to which new objects are added."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax import protocol
from iumad_jax.data import readers
from iumad_jax.data.readers.joined import Joined
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError
from iumad_jax.protocol import Step
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.storage import write_whole

CHANGEABLE = ("dataset", "train")  # groups of config keys that a step may change
_NAME = "plan.json"
_FIXED = {
    "dataset.objects": "use --objects",
    "dataset.prepared": "a run has one folder of prepared images",
    "train.optimizer": "config.continual.optimizer is that of all steps but the first",
}


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
            steps += (protocol.next_step(steps, tuple(entry["learned"]), entry["changes"]),)
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
    learned, changes = entry["learned"], entry["changes"]
    if not isinstance(learned, list) or not learned or not all(isinstance(name, str) for name in learned):
        raise ValueError("a step does not list its objects")
    if len(set(learned)) < len(learned) or (earlier and set(learned) & set(earlier[-1].seen)):
        raise ValueError("an object is learned twice")
    known = configs.flat(configs.paper("1-0").to_dict())
    for key, value in changes.items():
        if key.split(".")[0] not in CHANGEABLE or type(value) is not type(known.get(key)):
            raise ValueError(f"a step changes config.{key} to {value!r}")


def write(workdir: Path, steps: Sequence[Step]) -> None:
    """Write the plan.

    Raises:
        UserError: If it cannot be written.
    """
    content = [{"learned": step.learned, "changes": dict(step.changes)} for step in steps]
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
    return _with_objects(steps, [name for name in readers.objects(config) if name not in steps[-1].seen], {})


def with_new(
    config: ConfigDict, steps: tuple[Step, ...], names: str, changes: Mapping[str, Any], finished: int
) -> tuple[Step, ...]:
    """Add one step for each new object to the steps of a run.

    Args:
        config: Config of the run.
        steps: Steps planned so far, at least one.
        names: "all" for all objects that the run has not learned, or names separated by commas.
        changes: Keys under `dataset` and `train` with other values than the run's, for these steps.
        finished: Number of finished steps. Objects of planned steps that are not finished are continued with.

    Raises:
        UserError: If a key cannot be changed, an object is learned already or does not exist, none is new, or an
            unfinished step has other changes.
    """
    for key in _FIXED.keys() & changes.keys():
        raise UserError(f"--config.{key} cannot be changed here; {_FIXED[key]}.")
    changed = changed_config(config, changes)
    configs.check(changed)
    changed.dataset.objects = names
    learned = set(itertools.chain.from_iterable(step.learned for step in steps[:finished]))
    selected = readers.objects(changed)
    known = [name for name in selected if name in learned]
    if known and (names != "all" or len(known) == len(selected)):
        raise UserError(
            f"the run has learned {', '.join(known)} already; add the images of a new object to"
            f" {changed.dataset.root}, name their folder with --config.dataset.root, or rename another object's folder."
        )
    for step in steps[finished:]:
        if set(step.learned) & set(selected) and step.changes != changes:
            keys = " ".join(f"--config.{key}={value}" for key, value in step.changes.items()) or "without changed keys"
            raise UserError(f"the run has begun to learn {', '.join(step.learned)} {keys}; finish it so first.")
    return _with_objects(steps, [name for name in selected if name not in steps[-1].seen], changes)


def _with_objects(steps: tuple[Step, ...], names: Sequence[str], changes: Mapping[str, Any]) -> tuple[Step, ...]:
    for name in names:
        steps += (protocol.next_step(steps, (name,), changes),)
    return steps


def changed_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with other values of some keys."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def datasets(config: ConfigDict, steps: Sequence[Step]) -> list[tuple[ConfigDict, tuple[str, ...]]]:
    """List the configs of the datasets of all steps, each with the objects that were learned from it."""

    def dataset_changes(step: Step) -> dict[str, Any]:
        return {key: value for key, value in step.changes.items() if key.startswith("dataset.")}

    groups = itertools.groupby(steps, dataset_changes)
    return [(changed_config(config, changes), sum((step.learned for step in group), ())) for changes, group in groups]


def open_reader(config: ConfigDict, steps: Sequence[Step]) -> Reader:
    """Open the reader of all objects of a run, in the order of learning.

    Raises:
        UserError: As `readers.open_reader`.
    """
    opened = [readers.open_reader(dataset, names) for dataset, names in datasets(config, steps)]
    return opened[0] if len(opened) == 1 else Joined(opened)


def open_learned(config: ConfigDict, workdir: Path, objects: Sequence[str]) -> Reader:
    """Open the reader of the objects that a run has learned so far, in the order of learning.

    Raises:
        UserError: As `read` and `readers.open_reader`.
    """
    return open_reader(config, _learned(workdir, objects))


def open_for_use(config: ConfigDict, workdir: Path, objects: Sequence[str]) -> Reader:
    """Open the reader of the dataset that a trained model is used on.

    Args:
        config: Config of the run, possibly with another dataset. With the run's own, all objects that the run has
            learned are included, from whatever dataset, if they are still there.
        workdir: Workdir of the run.
        objects: Objects that the model has learned.

    Raises:
        UserError: As `read` and `readers.open_reader`.
    """
    if config.dataset != workdirs.read(workdir).dataset:
        return readers.open_reader(config)
    steps = _learned(workdir, objects)
    if others := tuple(name for name in readers.objects(config) if name not in objects):
        steps.append(protocol.next_step(steps, others, {}))
    opened = []
    for dataset, names in datasets(config, steps):
        available = readers.available(dataset)
        if present := [name for name in names if name in available]:
            opened.append(readers.open_reader(dataset, present))
    return Joined(opened)


def _learned(workdir: Path, objects: Sequence[str]) -> list[Step]:
    steps = [step for step in read(workdir) if set(step.learned) <= set(objects)]
    if not steps:
        raise UserError(f"{workdir / _NAME} is missing; restore it from a backup.")
    return steps
