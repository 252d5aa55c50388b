"""Incremental unified RGB-D anomaly detection in JAX.

    main prepare evaluate predict robustness benchmark latency   commands; `cli` is what they share
    experiment   the whole story of a run
    config protocol shapes errors   the legend

    training/    wires a run and trains a step
    continual/   strategies against forgetting, one file each
    export/      a detector as one file that runs without this package
    inference/   predicts, recognises, sets thresholds, evaluates; the detector
    methods/     published systems, one file each
    data/        readers of layouts, formats of files, depth, prepared images, the renderer
    report/      from the ledger to tables, pictures and a page
    models/      Flax modules
    metrics/     NumPy in, numbers out
    runtime/     files, snapshots, devices, processes

A package imports from those below it (pyproject.toml, checked in CI).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iumad_jax.data.sample import Camera
    from iumad_jax.inference.detector import Detector

__all__ = ["Camera", "Detector"]


def __getattr__(name: str) -> Any:
    """What loads JAX only when somebody asks for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from iumad_jax.inference import detector

    return getattr(detector, name)
