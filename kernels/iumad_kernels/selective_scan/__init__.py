"""Selective scan of Mamba (S6): one function with several implementations."""

from iumad_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
