"""Readers, depth processing and the input pipeline."""

from pathlib import Path

from ml_collections import ConfigDict

from iumad_jax.data import candies
from iumad_jax.data.eyecandies import Eyecandies
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError


def open_reader(config: ConfigDict) -> Reader:
    """The reader of `config.dataset`; candies are rendered first where they are missing.

    Raises:
        UserError: there is no such dataset, or its files are at fault.
    """
    root = Path(config.root)
    if config.name == "candies":
        candies.render(root, **config.render)
    elif config.name != "eyecandies":
        raise UserError(f'config.dataset.name is "{config.name}"; use eyecandies or candies.')
    return Eyecandies(root, config.objects, config.light)
