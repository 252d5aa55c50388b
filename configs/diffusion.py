"""DiAD and CDAD as published, on Eyecandies: diffusion of images, from Stable Diffusion 1.5. It needs a large GPU.

python -m iumad_jax.main --config=diffusion --config.diffusion.weights=v1-5-pruned.safetensors \
  --config.backbone.weights=resnet50-0676ba61.pth --config.dataset.root=FOLDER

CDAD: --config.method=cdad --config.continual.strategy=isvd --config.train.batch_size=12 --config.train.epochs=500. The
weights are yours to fetch, and their licences to read. Never run at this size.
"""

import math

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "10-0") -> ConfigDict:
    """Return the config of DiAD as published."""
    config = configs.paper(protocol)
    config.method = "diad"
    config.score = "own"
    config.input.size = 256
    config.backbone.name = "resnet50"
    config.continual.strategy = "finetune"
    config.train.epochs = 1000
    config.train.drop_epoch = 1000
    config.train.batch_size = 48
    config.train.learning_rate = 1e-5
    config.train.weight_decay = 0.01
    config.train.clip_norm = math.inf
    config.diffusion.remat = True
    return config
