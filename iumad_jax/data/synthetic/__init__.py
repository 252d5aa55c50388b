"""Synthetic defects in prepared images, for choosing settings without test images; `iumad_jax.synthetic` makes them."""

from iumad_jax.data.synthetic.pasting import paste

__all__ = ["paste"]
