"""IB-IUMAD on Eyecandies, as published.

python -m iumad_jax.main --config=configs/eyecandies.py:6-1 --config.dataset.root=FOLDER

Time and scores: not measured. An update with 2 images takes about 7 s on 2 CPU cores.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "10-0") -> ConfigDict:
    """Return the paper's config."""
    return configs.paper(protocol)
