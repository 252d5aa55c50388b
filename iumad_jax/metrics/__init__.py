"""Metrics of detection, localisation and forgetting, from NumPy arrays to Python floats; NaN where undefined."""

from iumad_jax.metrics.aupro import aupro, aupro_exact, pixel_metrics, pixel_metrics_of_groups, pro_curve
from iumad_jax.metrics.auroc import image_auroc, image_roc, pixel_auroc
from iumad_jax.metrics.bootstrap import (
    Spread,
    image_replicates,
    interval_of_mean,
    pixel_replicates,
    resample,
    spread,
)
from iumad_jax.metrics.forgetting import aggregate_forgetting, average_accuracy, drops, final, forgetting, plasticity

__all__ = [
    "Spread",
    "aggregate_forgetting",
    "aupro",
    "aupro_exact",
    "average_accuracy",
    "drops",
    "final",
    "forgetting",
    "image_auroc",
    "image_replicates",
    "image_roc",
    "interval_of_mean",
    "pixel_auroc",
    "pixel_metrics",
    "pixel_metrics_of_groups",
    "pixel_replicates",
    "plasticity",
    "pro_curve",
    "resample",
    "spread",
]
