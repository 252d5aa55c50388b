"""Incremental unified RGB-D anomaly detection in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iumad_jax.detector import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    """`Detector`, which loads JAX, only when somebody asks for it."""
    if name != "Detector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from iumad_jax.detector import Detector

    return Detector
