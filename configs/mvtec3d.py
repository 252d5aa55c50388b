"""IB-IUMAD on MVTec 3D-AD, as published.

python -m iumad_jax.main --config=configs/mvtec3d.py:6-1 --config.dataset.root=FOLDER

FOLDER contains bagel, cable_gland, ... as in the official archive. Time and scores: not measured.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "10-0") -> ConfigDict:
    """Return the paper's config."""
    config = configs.paper(protocol)
    config.dataset.name = "mvtec3d"
    config.dataset.root = "data/mvtec_3d_anomaly_detection"
    return config
