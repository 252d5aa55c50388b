"""Export a trained model as one file that runs without this package.

    python -m iumad_jax.export --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0

--format=stablehlo is for JAX, --format=onnx for ONNX runtimes; without it, the ending of --output decides. The exported
predictions are compared with JAX's.
"""

import json
import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.storage import write_whole

_FORMATS = ["stablehlo", "onnx"]


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _export)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    cli.define_thresholds(values)
    help_ = "Format of the file. Default: the ending of --output, or stablehlo."
    flags.DEFINE_enum("format", None, _FORMATS, help_, flag_values=values)
    flags.DEFINE_string("output", None, "File to write. Default: WORKDIR/detector.FORMAT.", flag_values=values)
    help_ = "Number of images per call. Default: any number in ONNX, 1 in StableHLO."
    flags.DEFINE_integer("batch", None, help_, lower_bound=1, flag_values=values)


def _export(values: flags.FlagValues) -> str:
    workdir, ending = cli.path(values, "workdir"), Path(values.output or "").suffix[1:]
    format_ = values.format or (ending if ending in _FORMATS else _FORMATS[0])
    batch = 1 if values.batch is None and format_ == "stablehlo" else values.batch
    workdirs.read(workdir)
    output = Path(values.output or workdir / f"detector.{format_}")
    if output.suffix != f".{format_}" or not output.parent.is_dir():
        raise UserError(f"--output={output}: choose a file ending in .{format_} in an existing folder.")
    from iumad_jax.export import formats  # loads JAX, so wrong flags are reported first
    from iumad_jax.inference import thresholds
    from iumad_jax.inference.detector import Detector

    cli.tell_slow("tracing and compiling the model, about a minute.")
    changes = {"model.scan": formats.SCANS[format_], "model.dtype": "float32"}  # ONNX runtimes lack bfloat16
    threshold = thresholds.parse(values.threshold)
    detector = Detector.load(workdir, values.step, quantile=values.quantile, threshold=threshold, **changes)
    content = formats.export(detector, format_, batch)
    difference = formats.check(detector, content, format_, batch)
    write_whole(output, content)
    description = {"format": format_, **formats.describe(detector, batch)}
    write_whole(output.with_name(f"{output.name}.json"), (json.dumps(description) + "\n").encode())
    size = f"{len(content) / 1e6:.1f} MB"
    return f"{output}: {size}; anomaly maps differ from JAX's by at most {difference:.1e} of the maximum."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
