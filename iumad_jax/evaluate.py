"""What a method's predictions are worth."""

import math

from iumad_jax.metrics import image_auroc, pixel_metrics
from iumad_jax.shapes import GroundTruth, Prediction


def evaluate(prediction: Prediction, truth: GroundTruth) -> dict[str, float]:
    """Every metric for the test images of one object, 0 to 1, NaN where undefined.

    Pixel metrics need to know where every defect is. Object-only metrics take their negatives where something rises
    above the belt; the stricter `workpiece` ones leave out what the image cuts off, such as the belt's side walls.
    """
    regions = {"object": truth.object, "workpiece": truth.workpiece}
    pixels = pixel_metrics(truth.mask, prediction.map, regions)
    if not truth.masked.all():
        pixels = dict.fromkeys(pixels, math.nan)
    return {"i_auroc": image_auroc(truth.anomalous, prediction.score), **pixels}
