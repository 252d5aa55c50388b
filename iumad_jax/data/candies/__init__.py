"""The embedded dataset: ten sweets on a conveyor belt, rendered on demand in the Eyecandies layout."""

from iumad_jax.data.candies.dataset import OBJECTS, render

__all__ = ["OBJECTS", "render"]
