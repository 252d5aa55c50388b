"""What we would give a factory: memory banks of frozen features at 448 pixels. Nothing is trained, nothing forgotten.

python -m iumad_jax.main --config=best --config.dataset.root=FOLDER

FOLDER has the layout of configs/folder.py, with one new object per step. Without depth, add --config.modality=rgb.

On 2 CPU cores, 100 images of the real CandyCane take less than 50 s and a prediction 0.12 s. I-AUROC, AUPRO and object
P-AUROC on its 50 test images: 0.58, 0.95 and 0.95.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "open") -> ConfigDict:
    """Return the config of memory banks for your own objects."""
    config = configs.small(protocol)
    config.dataset.name = "folder"
    config.dataset.root = "data/objects"
    config.method = "memory_bank"
    config.baselines = "feature_norm"
    config.continual.strategy = "finetune"
    config.input.size = 448
    config.backbone.grid = 28
    return config
