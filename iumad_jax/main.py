"""Trains and evaluates one method under one protocol: python -m iumad_jax.main --config=configs/quickstart.py."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from iumad_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with :X-Y to choose the protocol.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the default is named after the config.")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 2 for a user's mistake, told in one sentence."""
    if "--help" in arguments:
        print(
            f"{__doc__}\n\n{flags.FLAGS.main_module_help()}\n  --config.KEY=VALUE: every key is in iumad_jax/config.py"
        )
        return 0
    try:
        config, workdir = _parse(arguments)
        from iumad_jax import experiment  # after the flags: a typo is told at once, before JAX is loaded
        from iumad_jax.report import tables

        print(tables.console(experiment.run(config, workdir), workdir))
    except UserError as error:
        print(f"iumad_jax: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str]) -> tuple[ConfigDict, Path]:
    """The config with its changed keys, and the workdir."""
    try:
        rest = flags.FLAGS(arguments)
        config = _CONFIG.value
        if config is not None:
            name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
            keys = (config.protocol, config.method, config.modality, config.continual.strategy, f"seed{config.seed}")
            default = Path("runs") / "_".join((name, *keys))
    except flags.Error as error:
        found = str(error).rstrip(".")
        raise UserError(f"{found}; write --config=FILE, --workdir=FOLDER or --config.KEY=VALUE.") from error
    except (AttributeError, KeyError) as error:
        inner = error.args[0]
        key, _, hint = str(inner.args[0] if isinstance(inner, KeyError) else inner).partition("\n")
        hint = hint[:1].lower() + hint[1:] or "every key is explained in iumad_jax/config.py."
        raise UserError(f"--config has no key {key}; {hint}") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip(" .")
        raise UserError(f"--config cannot be read: {reason}.") from error
    if rest[1:]:
        raise UserError(
            f"argument {rest[1]} is not a flag; write --config=FILE, --workdir=FOLDER or --config.KEY=VALUE."
        )
    if config is None:
        raise UserError("--config is missing; for example --config=configs/quickstart.py.")
    return config, Path(_WORKDIR.value) if _WORKDIR.value else default


if __name__ == "__main__":
    sys.exit(main(sys.argv))
