"""Evaluates a trained model on any dataset, without training: python -m iumad_jax.evaluate --workdir=FOLDER."""

import hashlib
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _evaluate, dataset=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    help_ = "Where ledger and tables go, in place of earlier ones; by default a folder of WORKDIR/evaluations."
    flags.DEFINE_string("output", None, help_, flag_values=values)


def _evaluate(values: flags.FlagValues) -> str:
    workdir, config = cli.path(values, "workdir"), values.config
    from iumad_jax.inference import assessment  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.report import tables
    from iumad_jax.runtime import snapshots

    progress = snapshots.read(workdir, values.step)
    output = Path(values.output or workdir / "evaluations" / _name(config, workdir, progress.position.step))
    if (output / "config.json").exists():
        raise UserError(f"--output={output} is the folder of a run, which would lose its own results; choose another.")
    return tables.console(assessment.evaluate_snapshot(config, workdir, progress, output), output)


def _name(config: ConfigDict, workdir: Path, step: int) -> str:
    """The name of the folder for these results: one for each dataset."""
    from iumad_jax.runtime import workdir as workdirs

    own = config.dataset.to_dict() == workdirs.read(workdir).dataset.to_dict()
    digest = hashlib.sha256(config.dataset.to_json().encode()).hexdigest()[:8]
    return f"{config.dataset.name}{'' if own else f'_{digest}'}_step{step}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
