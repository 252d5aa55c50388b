"""First light: IB-IUMAD at a small size on ten rendered sweets, on any machine.

python -m iumad_jax.main --config=configs/quickstart.py

6 minutes and 3.3 GB on 2 CPU cores. Mean of the six base objects after the base step: I-AUROC 0.85, AUPRO 0.94, object
P-AUROC 0.91; of all ten after the last: 0.72, 0.85, 0.73, much being forgotten.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "6-4") -> ConfigDict:
    """Small enough for 2 cores and a few minutes."""
    config = configs.paper(protocol)
    config.dataset.name = "candies"
    config.dataset.root = "runs/candies"
    config.model.width = 128
    config.model.hidden = 512
    config.model.heads = 4
    config.model.layers = 1
    config.model.patch_size = 16
    config.model.dropout = 0.0  # so few updates need no regularisation but the jitter
    config.model.jitter.scale = 5.0
    config.model.standardise = True  # else the strongest channels are all that is learned in so few updates
    config.model.ib_weight = 0.001  # the loss of `fusion` is a mean over elements: with 1 the bottleneck drowns it
    config.train.epochs = 20
    config.train.batch_size = 8
    config.train.learning_rate = 2e-3
    config.train.schedule = "cosine"
    return config
