"""Draw contact sheets of synthetic defects that are pasted into the good images of a config's dataset.

    python -m iumad_jax.data.synthetic --config=quickstart

Good images are the calibration images, or training images if there are none. The panels of an image are: RGB, RGB with
the defect, encoded depth, encoded depth with the defect, mask.
"""

import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _draw)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    help_ = "Folder for one contact sheet per object. Default: WORKDIR/synthetic."
    flags.DEFINE_string("output", None, help_, flag_values=values)
    flags.DEFINE_integer("images", 8, "Number of defects per object.", lower_bound=1, flag_values=values)
    help_ = "Confines each defect to a small disc; otherwise its parts may be spread over the object."
    flags.DEFINE_bool("confined", True, help_, flag_values=values)


def _draw(values: flags.FlagValues) -> str:
    config, workdir = cli.config_and_workdir(values)
    from iumad_jax import config as configs
    from iumad_jax.data import readers  # loads JAX, so wrong flags are reported first
    from iumad_jax.data.prepared.processing import Processing
    from iumad_jax.data.synthetic import sheets

    configs.check(config)
    configs.refuse_tiles(config, "data.synthetic pastes defects")
    readers.render(config)
    reader = readers.open_reader(config)
    output = Path(values.output or workdir / "synthetic")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be created ({error.strerror}); choose another folder.") from error
    for name in reader.objects:
        sheets.save(output, reader, Processing.of(config, reader), name, values.images, config.seed, values.confined)
    return f"Contact sheets are in {output}."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
