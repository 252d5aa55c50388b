"""The values of the paper, each key explained, and a smaller setting: every file in configs/ starts from these."""

import functools
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from ml_collections import ConfigDict

from iumad_jax.errors import UserError

_LIMITS = {
    "seed": (0, 4_000_000),  # grain takes 32 bits of 1000 times as much
    "input.size": (32, 4096),
    "backbone.grid": (1, 256),
    "model.width": (2, 8192),
    "model.heads": (1, 8192),
    "model.layers": (1, 64),
    "model.hidden": (1, 65536),
    "model.dropout": (0, 0.99),
    "model.patch_size": (1, 4096),
    "model.states": (1, 256),
    "model.class_grid": (1, 4096),
    "model.bottleneck_ratio": (0.01, 1),
    "model.jitter.scale": (0, math.inf),
    "model.jitter.probability": (0, 1),
    "nearest_neighbours.patches_per_object": (2, 10**7),
    "decisions.quantile": (0.5, 1),
    "train.epochs": (0, 10**6 - 1),
    "train.batch_size": (1, 10**6),
    "train.learning_rate": (0, math.inf),
    "train.weight_decay": (0, math.inf),
    "train.clip_norm": (0, math.inf),
    "train.drop_epoch": (1, math.inf),
    "continual.sgd_learning_rate": (0, math.inf),
    "continual.anchor": (0, 1),
    "continual.compression": (0, math.inf),
    "continual.replay.rank": (0, 10_000),
    "continual.replay.image_size": (1, 4096),
    "report.pictures_per_object": (0, 1000),
}


VARIANTS: dict[str, dict[str, Any]] = {  # what a variant changes in the config that all share
    "uniad": {"method": "uniad", "continual.strategy": "finetune"},
    "iuf": {"method": "iuf", "continual.strategy": "iuf"},
    "ib_iumad": {"method": "ib_iumad", "continual.strategy": "iuf"},
    "ib_iumad-finetune": {"method": "ib_iumad", "continual.strategy": "finetune"},
    "ib_iumad-replay": {"method": "ib_iumad", "continual.strategy": "replay"},
    "ib_iumad-joint": {"method": "ib_iumad", "continual.strategy": "joint"},
    "ib_iumad-no_mamba": {"method": "ib_iumad", "continual.strategy": "iuf", "model.mamba": False},
    "ib_iumad-no_bottleneck": {"method": "ib_iumad", "continual.strategy": "iuf", "model.bottleneck": False},
}


def paper(protocol: str) -> ConfigDict:
    """IB-IUMAD as published, under a protocol such as "6-1" (see `iumad_jax.protocol`)."""
    config = ConfigDict()
    config.protocol = protocol
    config.method = "ib_iumad"  # or uniad, iuf; or one of the baselines in its place: feature_norm, nearest_neighbours
    config.baselines = "feature_norm,nearest_neighbours"  # what runs beside it, without training; names and commas
    config.modality = "rgb+depth"  # or rgb, depth
    config.seed = 0

    config.dataset = ConfigDict()
    config.dataset.name = "eyecandies"  # or mvtec3d, folder (one's own), candies: rendered where they are missing
    config.dataset.root = "data/eyecandies"
    config.dataset.objects = "all"  # or names separated by commas, in the order in which they are learned
    config.dataset.light = "4"  # eyecandies: which of the six, or all to train on; tests then have 4
    config.dataset.validation = "train"  # mvtec3d: what its images are for; or calibration
    config.dataset.render = ConfigDict({"seed": 0, "train": 24, "val": 4, "test": 16, "size": 256})  # candies only
    config.dataset.prepared = ""  # where prepared features are kept; "": in the workdir

    config.input = ConfigDict()
    config.input.size = 224  # pixels
    config.input.depth_encoding = "normals"  # or height, height+normals, xyz_uint8, normals_official (eyecandies)
    config.input.resident = "auto"  # training images in device memory if a quarter of it holds them; or always, never

    config.backbone = ConfigDict()
    config.backbone.name = "efficientnet_lite0"  # or efficientnet_b4, which needs weights
    config.backbone.weights = ""  # path of a .pth or .safetensors; "": those of the installed package
    config.backbone.grid = 14  # tokens per side

    config.model = ConfigDict()
    config.model.width = 256
    config.model.heads = 8
    config.model.layers = 4  # of the Mamba decoder or class network, the encoder and the decoder
    config.model.hidden = 1024  # of the feed-forward layers
    config.model.dropout = 0.1
    config.model.patch_size = 8  # of the Mamba decoder's stem, pixels
    config.model.states = 16  # of the selective scan, per channel
    config.model.scan = ""  # how it is computed: reference, xla or mosaic; "": what the device does best
    config.model.class_grid = 56  # side to which iuf's class network pools its image, pixels
    config.model.mamba = True  # False: no Mamba decoder, so that nothing tells what object it is (an ablation)
    config.model.detach_condition = True  # whether the reconstruction's loss stops short of what recognises objects
    config.model.fusion = "attention"  # each modality attends to the other; or addition (an ablation)
    config.model.bottleneck = True  # False: what is fused is the reconstruction (an ablation)
    config.model.bottleneck_ratio = 2 / 3
    config.model.kl = True  # False: the bottleneck has no loss but that of its heads (an ablation)
    config.model.target = "both"  # what the discriminator compares with, given two modalities; or rgb (paper), depth
    config.model.standardise = False  # z-score features by the base step's statistics
    config.model.jitter = ConfigDict({"scale": 20.0, "probability": 1.0})
    config.model.fusion_weight = 1.0
    config.model.object_weight = 1.0
    config.model.ib_weight = 1.0
    config.model.ib_head_weight = 1.0
    config.model.aux_reconstruction_weight = 0.0

    config.nearest_neighbours = ConfigDict({"patches_per_object": 2_000})

    config.train = ConfigDict()
    config.train.epochs = 800  # per step
    config.train.optimizer = "adamw"  # or sgd
    config.train.batch_size = 24
    config.train.learning_rate = 1e-4
    config.train.weight_decay = 1e-4
    config.train.clip_norm = 0.1
    config.train.schedule = "step"  # or cosine: with warm-up, to zero over the step
    config.train.drop_epoch = 800  # "step": after which the learning rate is a tenth

    config.continual = ConfigDict()
    config.continual.strategy = "iuf"  # or finetune, replay; or joint: all objects seen so far, not incremental
    config.continual.optimizer = "adamw"  # of steps after the base step; or sgd, as in IUF's release
    config.continual.sgd_learning_rate = 1.0  # of these steps, with sgd; adamw has that of train
    config.continual.anchor = 0.05  # iuf: how far weights go back to those before the step, each update; 0: not at all
    config.continual.projection = True  # iuf: whether updates are kept away from what old objects use
    config.continual.compression = 10.0  # iuf: weight of the base step's loss that leaves room for new objects; 0: none
    config.continual.replay = ConfigDict()
    config.continual.replay.rank = 8  # directions in which an object varies
    config.continual.replay.image_size = 56  # side of the coarse images, pixels
    config.decisions = ConfigDict({"quantile": 0.995})  # of good images that are to pass; see `inference.decisions`
    config.snapshots = ConfigDict({"every_minutes": 5.0})  # within a step
    config.debug = ConfigDict({"nans": False})  # find the operation that makes NaN or infinity in training: slow
    config.report = ConfigDict({"pictures_per_object": 6, "tensorboard": False})  # which needs tensorboardX
    return config


def small(protocol: str) -> ConfigDict:
    """The same, small enough for few images, 2 cores and a few minutes."""
    config = paper(protocol)
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
    config.continual.strategy = "replay"  # forgets least (README, "Learning without forgetting")
    config.continual.anchor = 0.01  # with 0.05 hardly anything new is learned at this learning rate
    return config


def cells(config: ConfigDict) -> Iterator[tuple[ConfigDict, tuple[str, str, str, int]]]:
    """The config of every run of a benchmark, the first seed of all before the second of any.

    The baselines do not depend on the variant: only the first one's runs have them.

    Yields:
        The config; and its variant, modality, protocol and seed.

    Raises:
        UserError: there is no such variant.
    """
    plan = config.benchmark
    variants, modalities, protocols = (plan[key].split(",") for key in ("variants", "modalities", "protocols"))
    if not set(variants) <= set(VARIANTS):
        raise UserError(f'config.benchmark.variants is "{plan.variants}"; use names of {", ".join(VARIANTS)}.')
    most = max(plan.seeds, plan.seeds_of_one_modality)
    for seed, protocol, modality, variant in product(range(most), protocols, modalities, variants):
        if seed >= (plan.seeds if "+" in modality else plan.seeds_of_one_modality):
            continue
        cell = config.copy_and_resolve_references()
        with cell.unlocked():
            del cell.benchmark
        changes = VARIANTS[variant] | {"protocol": protocol, "modality": modality, "seed": seed}
        cell.update_from_flattened_dict(changes)
        if variant != variants[0]:
            cell.baselines = ""
        yield cell, (variant, modality, protocol, seed)


def check(config: ConfigDict) -> None:
    """Raises UserError for a value of the right type but out of range."""
    for key, (low, high) in _LIMITS.items():
        value = functools.reduce(lambda group, name: group[name], key.split("."), config)
        if not low <= value <= high:  # also NaN
            raise UserError(f"config.{key} is {value}; use {low} to {high}.")
    if config.input.resident not in ("auto", "always", "never"):
        raise UserError(f'config.input.resident is "{config.input.resident}"; use auto, always or never.')
    model = config.model
    if model.width % 2 or model.width % model.heads:
        raise UserError(
            f"config.model.width is {model.width}; use an even multiple of config.model.heads, which is {model.heads}."
        )
    if config.method == "iuf" and model.width % 4:
        raise UserError(f"config.model.width is {model.width}; use a multiple of 4, the heads of iuf's class network.")
    if config.method == "uniad" and config.backbone.grid < 8:
        raise UserError(
            f"config.backbone.grid is {config.backbone.grid}, where uniad's mask of 7 x 7 tokens hides all; use 8 or"
            " more."
        )
    if model.patch_size > config.input.size:
        raise UserError(
            f"config.model.patch_size is {model.patch_size}; use at most config.input.size, which is"
            f" {config.input.size}."
        )


def modalities(config: ConfigDict) -> tuple[str, ...]:
    """The modalities that `config.modality` names.

    Raises:
        UserError: it names none.
    """
    if config.modality not in ("rgb", "depth", "rgb+depth"):
        raise UserError(f'config.modality is "{config.modality}"; use rgb, depth or rgb+depth.')
    return tuple(config.modality.split("+"))
