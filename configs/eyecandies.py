"""IB-IUMAD on Eyecandies, as published.

python -m iumad_jax.main --config=configs/eyecandies.py:6-1 --config.dataset.root=FOLDER

Time and scores at this size were not measured; an update of 2 images takes about 7 s on 2 CPU cores.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "10-0") -> ConfigDict:
    """The paper's setting."""
    return configs.paper(protocol)
