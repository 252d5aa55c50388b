"""IB-IUMAD on Eyecandies, as published.

python -m iumad_jax.main --config=configs/eyecandies.py:6-1 --config.dataset.root=FOLDER
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "10-0") -> ConfigDict:
    """The paper's setting."""
    return configs.paper(protocol)
