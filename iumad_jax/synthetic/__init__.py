"""Synthetic defects in good images, in the arrays that networks see: to train on, and to choose settings by."""

from iumad_jax.synthetic.defects import Defective, make_defects

__all__ = ["Defective", "make_defects"]
