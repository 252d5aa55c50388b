"""Writes a trained model as one file that runs without this package: python -m iumad_jax.export --workdir=FOLDER."""

import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError
from iumad_jax.export import formats
from iumad_jax.inference.detector import Detector
from iumad_jax.runtime.storage import write_whole

_TOLERANCE = 1e-4  # of the largest value


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _export)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    names = list(formats.SCANS)
    flags.DEFINE_enum("format", names[0], names, "Of the file: for JAX, or for ONNX runtimes.", flag_values=values)
    flags.DEFINE_string("output", None, "The file; WORKDIR/detector.FORMAT if not given.", flag_values=values)
    flags.DEFINE_integer("batch", 1, "Images per call.", lower_bound=1, flag_values=values)


def _export(values: flags.FlagValues) -> str:
    workdir, format_ = cli.path(values, "workdir"), values.format
    output = Path(values.output or workdir / f"detector.{format_}")
    if output.suffix != f".{format_}" or not output.parent.is_dir():
        raise UserError(f"--output={output}: give a file ending in .{format_}, in a folder that there is.")
    detector = Detector.load(workdir, values.step, **{"model.scan": formats.SCANS[format_]})
    content = formats.export(detector, format_, values.batch)
    difference = check(detector, content, format_, values.batch)
    write_whole(output, content)
    described = {"format": format_, **formats.describe(detector, values.batch)}
    write_whole(output.with_name(f"{output.name}.json"), (json.dumps(described) + "\n").encode())
    return (
        f"{output}: {len(content) / 1e6:.1f} MB; its maps differ from JAX's by at most {difference:.1e} of the largest."
    )


def check(detector: Detector, content: bytes, format_: str, batch: int) -> float:
    """The largest difference of maps of noise from those of the detector itself, as a share of the largest value.

    Raises:
        UserError: it is more than it may be.
    """
    rng = np.random.default_rng(0)
    specs = formats.input_specs(detector, batch).values()
    images = [rng.integers(0, 256, spec.shape).astype(np.float32) for spec in specs]
    found = formats.runner(content, format_)(*images).map
    expected = np.asarray(formats.flat(detector, batch)(*images).map)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= _TOLERANCE:
        raise UserError(f"the exported model's maps differ by {difference:.1e} from JAX's; please report this.")
    return difference


if __name__ == "__main__":
    sys.exit(main(sys.argv))
