"""Incremental unified RGB-D anomaly detection in JAX.

    main learn calibrate retire history prepare evaluate predict robustness choose benchmark latency   commands
    api          a run opened in Python
    cli          shared parts of the commands
    experiment   a run from its first step to its results
    config protocol shapes errors   shared definitions
    configs/     one file per experiment, the folder of this name in the repository

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

A package imports only from packages below it (pyproject.toml, checked in CI). `iumad` lists the commands.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iumad_jax.api import open_run as open_run
    from iumad_jax.data.sample import Camera as Camera
    from iumad_jax.inference.detector import Detector as Detector

_PUBLIC = {"Camera": "data.sample", "Detector": "inference.detector", "open_run": "api"}


def __getattr__(name: str) -> Any:
    """Import a public name, and with Detector or open_run also JAX, on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
