"""Incremental unified RGB-D anomaly detection in JAX."""

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
