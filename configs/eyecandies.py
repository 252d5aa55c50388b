"""IB-IUMAD on Eyecandies, as published: target, combination of modalities, image score, losses and schedule.

python -m iumad_jax.main --config=eyecandies:6-1 --config.dataset.root=FOLDER

Where it differs from the paper: the backbone is EfficientNet-Lite0, whose weights install as a package (the paper's:
--config.backbone.name=efficientnet_b4 --config.backbone.weights=FILE); the loss `ib_heads` is added, because the paper
does not say how the heads of the bottleneck are trained; depth is encoded as surface normals, with which frozen
features find more than with heights.

Time and scores: not measured. An update with 4 images takes 3.2 s on 2 CPU cores (kernels/README.md).
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "10-0") -> ConfigDict:
    """Return the paper's config."""
    return configs.paper(protocol)
