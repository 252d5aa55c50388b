"""Incremental unified RGB-D anomaly detection in JAX.

    main learn history prepare evaluate predict robustness choose benchmark latency   commands; `cli` is shared
    experiment   a run from its first step to its results
    config protocol shapes errors   shared definitions

    training/    opens a run and trains its steps
    continual/   strategies against forgetting, one file each
    export/      exports a detector as one file that runs without this package
    inference/   prediction, recognition, thresholds, evaluation, the detector
    methods/     methods, one file each
    data/        dataset layouts, file formats, depth, prepared images, the renderer
    report/      tables, pictures and a page from a run's ledger
    models/      Flax modules
    metrics/     metrics of NumPy arrays
    runtime/     files, snapshots, compiled programs, devices, processes

A package imports only from packages below it (pyproject.toml, checked in CI). `python -m iumad_jax` lists the commands.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iumad_jax.data.sample import Camera as Camera
    from iumad_jax.inference.detector import Detector as Detector


def __getattr__(name: str) -> Any:
    """Import the public classes Camera and Detector, and with them JAX, on first use."""
    if name not in ("Camera", "Detector"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from iumad_jax.inference import detector

    return getattr(detector, name)
