"""The smallest run, with a snapshot after every update, for the survival test.

python -m tests.harness.survival --config=survival
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "1-1") -> ConfigDict:
    """Return a config with two objects and a strategy that has state within and between steps."""
    config = configs.small(protocol)
    config.modality = "rgb"
    config.dataset.name = "candies"
    config.dataset.root = "runs/survival/candies"
    config.dataset.objects = "CandyCane,GummyBear"
    config.dataset.render.update(train=6, val=1, test=4, size=64)
    config.input.size = 64
    config.backbone.grid = 4
    config.model.width = 16
    config.model.hidden = 16
    config.model.heads = 2
    config.model.states = 2
    config.train.epochs = 6
    config.train.batch_size = 2
    config.continual.strategy = "iuf"
    config.snapshots.every_minutes = 0.0
    config.report.pictures_per_object = 2
    return config
