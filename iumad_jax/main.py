"""Trains and evaluates one method under one protocol: python -m iumad_jax.main --config=configs/quickstart.py."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from iumad_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with :X-Y to choose the protocol.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the default is named after the config.")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 2 for a user's mistake, told in one sentence."""
    try:
        try:
            rest = flags.FLAGS(arguments)
        except (flags.Error, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(" ".join(str(error).split())) from error
        if rest[1:]:
            raise UserError(
                f"argument {rest[1]} is not a flag; write --config=FILE, --workdir=FOLDER or --config.KEY=VALUE."
            )
        if _CONFIG.value is None:
            raise UserError("--config is missing; for example --config=configs/quickstart.py.")
        from iumad_jax import experiment  # after the flags: a typo is told at once, before JAX is loaded
        from iumad_jax.report import tables

        config = _CONFIG.value
        name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        default = Path("runs") / f"{name}_{config.protocol}_{config.method}_{config.modality}_seed{config.seed}"
        workdir = Path(_WORKDIR.value) if _WORKDIR.value else default
        print(tables.console(experiment.run(config, workdir), workdir))
    except UserError as error:
        print(f"iumad_jax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
