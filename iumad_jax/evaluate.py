"""Evaluate a trained model on the test images of its dataset, or of another one.

    python -m iumad_jax.evaluate --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0

--config.dataset.KEY=VALUE changes the dataset. Objects that the model never learned are evaluated as unknown objects.
--quantile and --threshold change the thresholds of the decisions.
"""

import hashlib
import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _evaluate, changeable=("dataset",))


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    cli.define_thresholds(values)
    help_ = "Folder of the results; existing results are overwritten. Default: a folder in WORKDIR/evaluations."
    flags.DEFINE_string("output", None, help_, flag_values=values)


def _evaluate(values: flags.FlagValues) -> str:
    workdir, config = cli.path(values, "workdir"), values.config
    from iumad_jax.inference import assessment, thresholds  # loads JAX, so wrong flags are reported first
    from iumad_jax.report import tables
    from iumad_jax.runtime import snapshots

    progress = snapshots.read(workdir, values.step)
    chosen = thresholds.choose(thresholds.parse(values.threshold), values.quantile, progress.calibration)
    if values.quantile is not None:
        config.decisions.quantile = values.quantile
    output = Path(values.output or workdir / "evaluations" / _name(config, workdir, progress.position.step, chosen))
    if (output / "config.json").exists():
        raise UserError(
            f"--output={output} is the workdir of a run, whose results would be overwritten; choose another folder."
        )
    return tables.console(assessment.evaluate_snapshot(config, workdir, progress, output, chosen), output)


def _name(config: ConfigDict, workdir: Path, step: int, chosen: dict[str, float]) -> str:
    """Return the name of the folder for the results, one per dataset, thresholds and step."""
    from iumad_jax.runtime import workdir as workdirs

    before, now = (
        json.dumps([values.dataset.to_dict() | {"trust": ""}, values.decisions.to_dict(), thresholds], sort_keys=True)
        for values, thresholds in ((workdirs.read(workdir), {}), (config, chosen))
    )
    digest = "" if now == before else f"_{hashlib.sha256(now.encode()).hexdigest()[:8]}"
    return f"{config.dataset.name}{digest}_step{step}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
