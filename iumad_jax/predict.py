"""Looks at images with a trained model: python -m iumad_jax.predict --workdir=FOLDER --input=PATH --output=FOLDER.

--input is an image or a folder of images, with subfolders; without it, the test images of the run's dataset, or of
the one that --config.dataset.KEY=VALUE names, are looked at. No labels are needed. Written are predictions.csv,
predictions.json, and for every image a mask and a heatmap. Images that cannot be read are told and left out, and the
exit code is then 2. The probability of an object holds for images that show one of those learned; whether it does, the
distance tells, which is above its threshold where the decision is unknown.
"""

import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _predict, dataset=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    for name, help_ in {
        "input": "An image (PNG, JPEG, TIFF, BMP) or a folder of images.",
        "depth": "The image's depth (16-bit PNG, TIFF, NPY, PLY, PCD), or a folder with files of the images' names.",
        "output": "The folder to write to, new or empty.",
        "object": "The object that all images show; recognised if not given.",
    }.items():
        flags.DEFINE_string(name, None, help_, flag_values=values)
    splits = ["test", "unlabelled", "calibration", "train"]
    flags.DEFINE_enum("split", splits[0], splits, "Which images of the dataset, without --input.", flag_values=values)
    help_ = "Metres per unit of the depth files, such as 0.001; needed where they hold whole numbers."
    flags.DEFINE_float("depth_unit", None, help_, flag_values=values)
    help_ = "fx,fy,cx,cy of the depth images, in pixels; that of the training images if not given."
    flags.DEFINE_list("camera", None, help_, flag_values=values)


def _predict(values: flags.FlagValues) -> str:
    output = cli.path(values, "output")
    from iumad_jax.data import readers  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.data.readers import unlabelled
    from iumad_jax.inference import predictions
    from iumad_jax.inference.detector import Detector

    predictions.check_output(output, values.input)
    detector = Detector.load(cli.path(values, "workdir"), values.step)
    detector.number(values.object)
    if values.input:
        depth = Path(values.depth) if values.depth else None
        camera = unlabelled.camera_of(values.camera) if values.camera else None
        needs_depth = "depth" in detector.processing.modalities
        chosen = list(unlabelled.photographs(Path(values.input), needs_depth, depth, values.depth_unit, camera))
    else:
        chosen = list(unlabelled.samples(readers.open_reader(values.config), values.split))
    rows, damaged = predictions.predict(detector, str(values.workdir), chosen, values.object, output)
    if damaged:
        rest = f"the others are in {output}" if rows else "correct them"
        raise UserError(f"{len(damaged)} of {len(chosen)} images could not be used; {rest}.")
    counts = {name: sum(row["decision"] == name for row in rows) for name in ("good", "anomalous", "unknown")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{len(rows)} images: {told}. Scores, masks and heatmaps are in {output}."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
