"""Synthetic defects in good images, for choosing settings without test images and for training on defects."""

from iumad_jax.data.synthetic.defects import Pasted, paste

__all__ = ["Pasted", "paste"]
