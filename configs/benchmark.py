"""Compares method variants and three training-free baselines under the paper's protocols, on ten rendered sweets.

python -m iumad_jax.benchmark --config=benchmark

Every cell is one run; the same command resumes an interrupted benchmark. RESULTS.md lists time and scores.
"""

from ml_collections import ConfigDict

from iumad_jax import config as configs


def get_config(protocol: str = "6-4") -> ConfigDict:
    """Return the config shared by all cells, small enough for 2 CPU cores; `benchmark` lists their differences."""
    config = configs.small(protocol)
    config.dataset.name = "candies"
    config.dataset.root = "runs/candies"
    config.input.size = 128
    config.backbone.grid = 10
    config.model.width = 96
    config.model.hidden = 384
    config.model.class_grid = 28
    config.train.epochs = 15
    config.report.pictures_per_object = 0

    config.benchmark = ConfigDict()
    config.benchmark.variants = "uniad,iuf,ib_iumad"  # names of iumad_jax.benchmark.VARIANTS
    config.benchmark.modalities = "rgb,depth,rgb+depth"
    config.benchmark.protocols = "10-0,9-1,6-4,6-1"
    config.benchmark.seeds = 3
    config.benchmark.seeds_of_one_modality = 1
    return config
