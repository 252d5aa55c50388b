"""One's own objects, learned one after the other: a smaller model and fewer epochs than the paper's.

python -m iumad_jax.main --config=configs/folder.py --config.dataset.root=FOLDER

FOLDER/OBJECT/train/good/rgb holds good images and .../depth their depth, FOLDER/OBJECT/test/{good,DEFECT}/{rgb,depth,
mask} images to judge by; the README tells more. Without depth: --config.modality=rgb. Time and scores depend on the
images and were not measured.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "1-1") -> ConfigDict:
    """The quickstart's sizes."""
    config = configs.small(protocol)
    config.dataset.name = "folder"
    config.dataset.root = "data/objects"
    return config
