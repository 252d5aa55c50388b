"""Shared parts of the commands: flags, --help, and errors as one sentence with an exit code."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from iumad_jax import config as configs
from iumad_jax.errors import CLOSED_OUTPUT, INTERRUPTED, USER_ERROR, UserError
from iumad_jax.runtime import compilation_cache, memory, preemption
from iumad_jax.runtime import workdir as workdirs


def execute(
    doc: str,
    arguments: list[str],
    define: Callable[[flags.FlagValues], None],
    act: Callable[[flags.FlagValues], str],
    *,
    changeable: tuple[str, ...] = (),
    resumable: bool = False,
) -> int:
    """Run a command and return its exit code.

    Args:
        doc: Docstring of the command: a summary, an example and a description, separated by empty lines.
        arguments: Arguments of the process, beginning with its name.
        define: Defines the command's flags.
        act: Runs the command and returns its output, "" for none. Only this imports JAX, so that wrong flags are
            reported at once.
        changeable: Groups of keys, such as dataset, of which --config.GROUP.KEY=VALUE changes the config of the run in
            --workdir.
        resumable: Whether SIGTERM and SIGINT may interrupt the command, which then resumes when started again.
    """
    return until_closed(lambda: _execute(doc, arguments, define, act, changeable, resumable))


def until_closed(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; end it silently if the reader of its output, such as head, has ended."""
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it ends
        return CLOSED_OUTPUT
    return code


def _execute(
    doc: str,
    arguments: list[str],
    define: Callable[[flags.FlagValues], None],
    act: Callable[[flags.FlagValues], str],
    changeable: tuple[str, ...],
    resumable: bool,
) -> int:
    values = flags.FlagValues()
    define(values)
    _define_compilation_cache(values)
    if "--help" in arguments:
        print(_help(doc, values, changeable, resumable))
        return 0
    try:
        if changeable:
            _define_changes(values, arguments, changeable)
        elif "config" in values:
            arguments = _with_config_file(arguments)
        _parse(values, arguments, changeable)
        memory.keep_buffers()
        compilation_cache.enable(values.compilation_cache)
        with preemption.handle_signals() if resumable else nullcontext():
            if text := act(values):
                print(text)
    except UserError as error:
        print(f"iumad_jax: {error}", file=sys.stderr)
        return USER_ERROR
    except preemption.Interrupted:  # reported when the signal arrived
        return INTERRUPTED
    return 0


def tell_slow(what: str) -> None:
    """Tell a person at a terminal what a slow step does."""
    if sys.stderr.isatty():
        print(f"iumad_jax: {what}", file=sys.stderr)


def summary_and_example(doc: str) -> tuple[str, str]:
    """Return the summary and the example of a command's docstring."""
    summary, example, *_ = doc.strip().split("\n\n")
    return summary, example.strip()


def _help(doc: str, values: flags.FlagValues, changeable: tuple[str, ...], resumable: bool) -> str:
    summary, example = summary_and_example(doc)
    description = doc.strip().split("\n\n")[2:]
    lines = [f"  --{name}  {values[name].help}{_default(values[name])}" for name in values]
    lines += [
        f"  --config.{group}.KEY  Changes a key of the {group} config, see iumad_jax/config.py." for group in changeable
    ]
    if changeable:
        lines += [f"  --config.{key}  Names the file of weights, if it was moved." for key in workdirs.FILES]
    if not changeable and "config" in values:
        lines.append("  --config.KEY  Changes a key of the config; iumad_jax/config.py explains all keys.")
    if resumable:
        description.append(
            f"Exit codes: 0 done; {USER_ERROR} a mistake, reported in one sentence; {INTERRUPTED} interrupted, for"
            " example by SIGTERM\nor SIGINT: the same command resumes."
        )
    return "\n\n".join([f"Example:\n  {example}", summary, *description, "\n".join(["Flags:", *lines])])


def _default(flag: flags.Flag) -> str:
    if flag.default in (None, False):
        return ""
    return f" Default: {','.join(flag.default) if isinstance(flag.default, list) else flag.default}."


def define_config(values: flags.FlagValues) -> None:
    """Define --config=NAME_OR_FILE[:X-Y] and --config.KEY=VALUE."""
    help_ = f"Config: {', '.join(_configs())}, or a file of yours; append :X-Y to choose the protocol."
    config_flags.DEFINE_config_file("config", None, help_, flag_values=values)


def _configs() -> dict[str, Path]:
    """List the files of the configs that come with the package by name."""
    return {file.stem: file for file in sorted(Path(__file__).with_name("configs").glob("*.py"))}


def _with_config_file(arguments: list[str]) -> list[str]:
    """Replace the name of a config, in --config=NAME or --config NAME, by its file."""
    found = [*arguments]
    for i, argument in enumerate(arguments):
        flag, separator, value = argument.partition("=")
        if flag in ("--config", "-config"):
            if separator:
                found[i] = f"{flag}={_config_file(value)}"
            elif i + 1 < len(arguments):
                found[i + 1] = _config_file(arguments[i + 1])
    return found


def _config_file(value: str) -> str:
    """Return the value of --config with the file of the config that it names.

    Raises:
        UserError: If it is neither a file nor the name of a config.
    """
    path, colon, protocol = value.partition(":")
    with _config_errors():
        if Path(path).is_file():
            return value
    name, files = Path(path).name.removesuffix(".py"), _configs()
    if name not in files:
        raise UserError(f"--config={value} is neither a file nor a config; use a file, or one of {', '.join(files)}.")
    if path not in (name, f"{name}.py"):
        raise UserError(
            f"--config={value} is no file; use --config={name}{colon}{protocol}, which is found from any folder."
        )
    return f"{files[name]}{colon}{protocol}"


def define_workdir(values: flags.FlagValues) -> None:
    """Define --workdir, the folder of a config's run."""
    help_ = "Folder of the run. Default: runs/NAME, named after the config."
    flags.DEFINE_string("workdir", None, help_, flag_values=values)


def config_and_workdir(values: flags.FlagValues) -> tuple[ConfigDict, Path]:
    """Return the config of --config with its changed keys, and the workdir of its run.

    Raises:
        UserError: If --config is missing.
    """
    config = values.config
    if config is None:
        raise UserError("--config is missing; for example --config=quickstart.")
    name = Path(config_flags.get_config_filename(values["config"])).stem
    keys = (config.protocol, config.method, config.modality, config.continual.strategy, f"seed{config.seed}")
    return config, Path(values.workdir or f"runs/{'_'.join((name, *keys))}")


def define_trained(values: flags.FlagValues) -> None:
    """Define --workdir and --step, which choose a trained model."""
    flags.DEFINE_string("workdir", None, "Folder of a trained run.", flag_values=values)
    help_ = "Uses the model after this step, counted from 0. Default: the last finished step."
    flags.DEFINE_integer("step", None, help_, flag_values=values)


def define_thresholds(values: flags.FlagValues) -> None:
    """Define --quantile and --threshold, which replace the thresholds of the run."""
    help_ = "Share of good images below the thresholds. Default: config.decisions.quantile of the run."
    flags.DEFINE_float("quantile", None, help_, 0.5, 1, flag_values=values)
    help_ = "Threshold of the scores of all objects, or OBJECT=NUMBER,...; pixels' change by the same factor."
    flags.DEFINE_list("threshold", None, help_, flag_values=values)


def path(values: flags.FlagValues, name: str) -> Path:
    """Return the path given by a flag.

    Raises:
        UserError: If the flag is missing.
    """
    if not (value := values[name].value):
        raise UserError(f"--{name} is missing; write --{name}=PATH.")
    return Path(value)


def run_and_changes(values: flags.FlagValues) -> tuple[ConfigDict, dict[str, Any]]:
    """Return the config of the run in --workdir, and the keys to which --config.KEY=VALUE gives another value.

    What --config.dataset.trust names is trusted in addition, by the run itself, whose datasets are read together; and
    the run itself uses files that were moved.
    """
    run = workdirs.read(path(values, "workdir"))
    run.update_from_flattened_dict(workdirs.moved_files(Path(values.workdir), values.config))
    named = *run.dataset.trust.split(","), *values.config.dataset.trust.split(",")
    run.dataset.trust = values.config.dataset.trust = ",".join(filter(None, dict.fromkeys(named)))
    before, now = (configs.flat(json.loads(config.to_json())) for config in (run, values.config))
    return run, {key: value for key, value in now.items() if value != before[key]}


def _define_compilation_cache(values: flags.FlagValues) -> None:
    help_ = (
        "Folder of compiled programs, which make later commands start faster. Default: iumad_jax in the user's cache"
        f" folder. {compilation_cache.OFF} compiles anew."
    )
    flags.DEFINE_string("compilation_cache", None, help_, flag_values=values)


def _define_changes(values: flags.FlagValues, arguments: list[str], changeable: tuple[str, ...]) -> None:
    """Define --config.GROUP.KEY=VALUE for the config of the run in --workdir; refuse keys of other groups."""
    only_workdir = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=only_workdir)
    _parse(only_workdir, arguments, known_only=True)
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if key == "config.decisions.quantile" and "quantile" in values:
            raise UserError("--config.decisions.quantile is fixed by training; use --quantile to decide anew.")
        group = key.removeprefix("config.")
        if key != group and group.split(".")[0] not in changeable and group not in workdirs.FILES:
            allowed = " and ".join(f"--config.{group}.KEY" for group in changeable)
            raise UserError(f"--{key} is fixed by training; only {allowed} can be changed here.")
    config = workdirs.read(path(only_workdir, "workdir"))
    with _config_errors():
        config_flags.DEFINE_config_dict("config", config, flag_values=values)


def _parse(
    values: flags.FlagValues, arguments: list[str], changeable: tuple[str, ...] = (), *, known_only: bool = False
) -> None:
    try:
        with _config_errors():
            positional = values(arguments, known_only=known_only)
            if "config" in values:
                getattr(values.config, "seed", None)  # raises the error of an unreadable file
    except flags.UnrecognizedFlagError as error:
        flag, separator, value = str(error.flagvalue).lstrip("-").partition("=")
        if "config" in values and (key := _key_ending_in(flag, changeable)):
            raise UserError(f"--{flag} is no flag; use --config.{key}={value if separator else 'VALUE'}.") from error
        raise UserError(f"{str(error).rstrip('.')}; see --help.") from error
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; see --help.") from error
    if positional[1:] and not known_only:
        if len(positional[1]) < 256 and Path(positional[1]).exists():
            raise UserError(
                f"argument {positional[1]} is not a flag; each flag takes one file or folder, and shells replace * by"
                " several."
            )
        raise UserError(f"argument {positional[1]} is not a flag; see --help.")


def _key_ending_in(parts: str, groups: tuple[str, ...] = ()) -> str | None:
    """Return the one key, of these groups if any are given, that is or ends in these parts; None without one."""
    wanted = parts.replace("-", "_")
    keys = [key for key in configs.flat(configs.paper("1-0").to_dict()) if not groups or key.split(".")[0] in groups]
    ending = [key for key in keys if key.endswith(f".{wanted}")]
    return wanted if wanted in keys else ending[0] if len(ending) == 1 else None


@contextmanager
def _config_errors() -> Iterator[None]:
    """Turn ml_collections' errors about a wrong file or key into a UserError."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        inner = error.args[0]
        key, _, hint = str(inner.args[0] if isinstance(inner, KeyError) else inner).partition("\n")
        meant = _key_ending_in(key.strip("'"))
        hint = f"use --config.{meant}." if meant else hint[:1].lower() + hint[1:]
        hint = hint or "every key is explained in iumad_jax/config.py."
        raise UserError(f"--config has no key {key}; {hint}") from error
    except (OSError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip(" .")
        raise UserError(f"--config cannot be read: {reason}.") from error
