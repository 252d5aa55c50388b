"""Methods, one file per published system; `build` creates the one that a config selects."""

import math

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.errors import UserError
from iumad_jax.methods.cdad import cdad
from iumad_jax.methods.destseg import destseg
from iumad_jax.methods.diad import diad
from iumad_jax.methods.feature_norm import feature_norm
from iumad_jax.methods.gaussian import gaussian
from iumad_jax.methods.ib_iumad import ib_iumad
from iumad_jax.methods.iuf import iuf
from iumad_jax.methods.memory_bank import memory_bank
from iumad_jax.methods.method import Method
from iumad_jax.methods.simplenet import simplenet
from iumad_jax.methods.uniad import uniad

BASELINES = ("feature_norm", "gaussian", "memory_bank")  # training-free; a useful method must beat them


def with_baselines(config: ConfigDict) -> dict[str, Method]:
    """Build the config's method and then its baselines, by name.

    Raises:
        UserError: If the method or a baseline does not exist.
    """
    baselines = [name for name in config.baselines.split(",") if name]
    if not set(baselines) <= set(BASELINES):
        raise UserError(f'config.baselines is "{config.baselines}"; use "{",".join(BASELINES)}", one of them, or "".')
    return {name: build(name, config) for name in dict.fromkeys([config.method, *baselines])}


def build(name: str, config: ConfigDict) -> Method:
    """Build a method by its name.

    Raises:
        UserError: If the method does not exist.
    """
    methods = {
        "ib_iumad": lambda: ib_iumad(config.model, configs.modalities(config)),
        "uniad": lambda: uniad(config.model, configs.modalities(config)),
        "iuf": lambda: iuf(config.model, configs.modalities(config)),
        "simplenet": lambda: simplenet(config.simplenet, config.backbone, configs.modalities(config)),
        "destseg": lambda: destseg(config),
        "diad": lambda: diad(config),
        "cdad": lambda: cdad(config),
        "feature_norm": feature_norm,
        "gaussian": gaussian,
        "memory_bank": lambda: memory_bank(config.memory_bank, math.prod(configs.tile_numbers(config.input.tiles))),
    }
    if name not in methods:
        raise UserError(f'config.method is "{name}"; use one of {", ".join(methods)}.')
    return methods[name]()
