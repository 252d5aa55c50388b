"""Fast kernels for JAX, usable without the rest of the project."""

from iumad_kernels.selective_scan import selective_scan

__all__ = ["selective_scan"]
