"""The embedded datasets: ten sweets, or any number of procedural ones, rendered on demand in the Eyecandies layout."""

from iumad_jax.data.candies.dataset import OBJECTS, render
from iumad_jax.data.candies.procedural import names

__all__ = ["OBJECTS", "names", "render"]
