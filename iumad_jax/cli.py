"""What all commands share: flags, help, and a user's mistake told in one sentence with exit code 2."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from iumad_jax.errors import INTERRUPTED, USER_ERROR, UserError
from iumad_jax.runtime import preemption
from iumad_jax.runtime import workdir as workdirs


def execute(
    doc: str,
    arguments: list[str],
    define: Callable[[flags.FlagValues], None],
    act: Callable[[flags.FlagValues], str],
    *,
    dataset: bool = False,
    resumable: bool = False,
) -> int:
    """Runs a command and returns its exit code.

    Args:
        doc: what --help says first.
        arguments: of the process, its own name first.
        define: defines the command's flags.
        act: does it and returns what to print. It imports what loads JAX, so that a typo is told at once.
        dataset: whether --config.dataset.KEY=VALUE changes the config of the run in --workdir.
        resumable: whether the command goes on where it stopped, so that SIGTERM and SIGINT may stop it anywhere.
    """
    values = flags.FlagValues()
    define(values)
    if "--help" in arguments:
        lines = [f"{name}: {values[name].help}" for name in values]
        if dataset or "config" in values:
            lines.append(f"config.{'dataset.' if dataset else ''}KEY: every key is in iumad_jax/config.py")
        if resumable:
            doc += (
                f"\nExit codes: 0 done; {USER_ERROR} a mistake, told in a sentence; {INTERRUPTED} stopped by SIGTERM or"
                " SIGINT with all work saved:\nthe same command goes on from there.\n"
            )
        print("\n".join([doc, "", *(f"  --{line}" for line in lines)]))
        return 0
    try:
        if dataset:
            _define_dataset(values, arguments)
        _parse(values, arguments)
        with preemption.handled() if resumable else nullcontext():
            print(act(values))
    except UserError as error:
        print(f"iumad_jax: {error}", file=sys.stderr)
        return USER_ERROR
    except preemption.Interrupted:  # which was told when the signal came
        return INTERRUPTED
    return 0


def define_config(values: flags.FlagValues) -> None:
    """Defines --config=FILE[:X-Y] and --config.KEY=VALUE."""
    help_ = "A file of configs/, with :X-Y to choose the protocol."
    config_flags.DEFINE_config_file("config", None, help_, flag_values=values)


def define_workdir(values: flags.FlagValues) -> None:
    """Defines --workdir, where a config's run is kept."""
    help_ = "Where the run is kept; the default is named after the config."
    flags.DEFINE_string("workdir", None, help_, flag_values=values)


def given_config(values: flags.FlagValues) -> tuple[ConfigDict, Path]:
    """The config that --config names, with its changed keys, and the workdir of its run.

    Raises:
        UserError: there is none.
    """
    config = values.config
    if config is None:
        raise UserError("--config is missing; for example --config=configs/quickstart.py.")
    name = Path(config_flags.get_config_filename(values["config"])).stem
    keys = (config.protocol, config.method, config.modality, config.continual.strategy, f"seed{config.seed}")
    return config, Path(values.workdir or f"runs/{'_'.join((name, *keys))}")


def define_trained(values: flags.FlagValues) -> None:
    """Defines --workdir and --step, which name a trained model."""
    flags.DEFINE_string("workdir", None, "Where a trained run is kept.", flag_values=values)
    flags.DEFINE_integer(
        "step", None, "After which step, by number; the last one done if not given.", flag_values=values
    )


def path(values: flags.FlagValues, name: str) -> Path:
    """The path that a flag gives.

    Raises:
        UserError: it gives none.
    """
    given = values[name].value
    if not given:
        raise UserError(f"--{name} is missing; write --{name}=PATH.")
    return Path(given)


def _define_dataset(values: flags.FlagValues, arguments: list[str]) -> None:
    """Defines --config.KEY=VALUE with the config of the run in --workdir, and refuses what is not of the dataset."""
    only_workdir = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=only_workdir)
    _parse(only_workdir, arguments, known_only=True)
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if key.startswith("config.") and not key.startswith("config.dataset."):
            raise UserError(f"--{key} belongs to training; here only --config.dataset.KEY can be changed.")
    config = workdirs.read(path(only_workdir, "workdir"))
    with _config_errors():
        config_flags.DEFINE_config_dict("config", config, flag_values=values)


def _parse(values: flags.FlagValues, arguments: list[str], known_only: bool = False) -> None:
    try:
        with _config_errors():
            rest = values(arguments, known_only=known_only)
            if "config" in values:
                getattr(values.config, "seed", None)  # tells what was wrong with the file
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; see --help.") from error
    if rest[1:] and not known_only:
        raise UserError(f"argument {rest[1]} is not a flag; see --help.")


@contextmanager
def _config_errors() -> Iterator[None]:
    """Puts into a sentence what a wrong file or key leads to in ml_collections."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        inner = error.args[0]
        key, _, hint = str(inner.args[0] if isinstance(inner, KeyError) else inner).partition("\n")
        hint = hint[:1].lower() + hint[1:] or "every key is explained in iumad_jax/config.py."
        raise UserError(f"--config has no key {key}; {hint}") from error
    except (OSError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip(" .")
        raise UserError(f"--config cannot be read: {reason}.") from error
