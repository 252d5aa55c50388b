"""Predict images with a trained model: decision, score, mask and heatmap of each.

    python -m iumad_jax.predict --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0 --output=runs/predictions

--input names an image or a folder of images with subfolders; labels are not needed. Without it, the test images of the
run's dataset are predicted, or of the dataset that --config.dataset.KEY=VALUE names.

The decision is good, anomalous or unknown. Unknown means that the image is farther from its object than the threshold,
so it probably shows an object that was never learned. The probability of the object assumes a learned one. Unknown
images are grouped by likeness. Every group becomes a picture and a folder of copies of its images, which the printed
command learns as a new object, once a person has looked at them and removed those with defects. --quantile and
--threshold replace the thresholds of the run.

Results are predictions.csv, predictions.json, masks, heatmaps and predictions.html, which shows the images by score.
Images that cannot be read are reported and skipped; the exit code is then 2.

--watch judges the images in the folder --input and then each new one once it is complete, until Ctrl-C or SIGTERM. Each
becomes one line of JSON on standard output: its row of predictions.json, or the reason why it cannot be used. Images
that change are judged again. Unknown images are not grouped.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError
from iumad_jax.runtime import workdir as workdirs


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _predict, changeable=("dataset",))


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    cli.define_thresholds(values)
    for name, help_ in {
        "input": "Image (PNG, JPEG, TIFF, BMP, WebP) or folder of images; depth, of a model of depth alone.",
        "depth": "Depth of the image (16-bit PNG, TIFF, NPY, PLY, PCD), or folder of depth files named like images.",
        "output": "Folder of the results, new or empty.",
        "object": "Object that all images show. Default: recognised in each image.",
    }.items():
        flags.DEFINE_string(name, None, help_, flag_values=values)
    splits = ["test", "unlabelled", "calibration", "train"]
    flags.DEFINE_enum(
        "split", splits[0], splits, "Split of the dataset to predict without --input.", flag_values=values
    )
    help_ = "Unit of the depth files: m, cm, mm, um, or metres. Default: that of the training images."
    flags.DEFINE_string("depth_unit", None, help_, flag_values=values)
    sizes = ["none", "small", "full"]
    help_ = "Size of the heatmaps: at most 640 pixels per side, or that of the photographs."
    flags.DEFINE_enum("heatmaps", sizes[1], sizes, help_, flag_values=values)
    flags.DEFINE_bool("watch", False, "Judges each new image of the folder --input until stopped.", flag_values=values)
    help_ = "fx,fy,cx,cy of the depth images in pixels. Default: the camera of the training images."
    flags.DEFINE_list("camera", None, help_, flag_values=values)


def _predict(values: flags.FlagValues) -> str:
    output = cli.path(values, "output")
    from iumad_jax.data import plan  # loads JAX, so wrong flags are reported first
    from iumad_jax.data.formats import files
    from iumad_jax.data.readers import unlabelled
    from iumad_jax.inference import predictions, thresholds, unknown_images
    from iumad_jax.inference.detector import Detector

    predictions.check_output(output, values.input)
    if values.watch and not (values.input and Path(values.input).is_dir()):
        raise UserError(f"--watch needs a folder, but --input is {values.input}; name the folder that receives images.")
    threshold = thresholds.parse(values.threshold)
    workdir = cli.path(values, "workdir")
    moved = workdirs.moved_files(workdir, values.config)
    detector = Detector.load(workdir, values.step, quantile=values.quantile, threshold=threshold, **moved)
    detector.object_number(values.object)

    def photographs() -> Iterator[unlabelled.InputImage]:
        depth = Path(values.depth) if values.depth else None
        camera = unlabelled.parse_camera(values.camera) if values.camera else None
        needs_depth = "depth" in detector.processing.modalities
        format_, bits = detector.depth_format, detector.processing.bits
        trusted = files.trusted(values.config.dataset.trust)
        if values.depth_unit is not None:
            format_ = replace(format_, unit=unlabelled.parse_unit(values.depth_unit))
        if depth or "rgb" in detector.processing.modalities:
            return unlabelled.photographs(
                Path(values.input), needs_depth, depth, format_, camera, bits, trusted, may_be_empty=values.watch
            )
        return unlabelled.depth_files(
            Path(values.input), format_, camera, detector.default_camera, trusted, may_be_empty=values.watch
        )

    settings = str(values.workdir), values.object, output, values.heatmaps
    cli.tell_slow("compiling the model, about 20 s the first time.")
    if values.watch:
        rows = predictions.watch(detector, photographs, *settings)
        print(f"iumad_jax: {predictions.summary(rows)}. The results are in {output}.", file=sys.stderr)
        return ""
    if values.input:
        images = list(photographs())
    else:
        dataset = plan.open_for_use(values.config, Path(values.workdir), detector.step)
        images = list(unlabelled.split_images(dataset, values.split))
    rows, damaged, groups = predictions.predict(detector, images, *settings)
    if groups:
        print(unknown_images.describe(groups, values.workdir))
    if damaged:
        remedy = f"the others are in {output}" if rows else "correct them"
        raise UserError(f"{len(damaged)} of {len(images)} images cannot be used; {remedy}.")
    return f"{predictions.summary(rows)}. Scores, masks and heatmaps are in {output}."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
