"""Config keys with the paper's values (`paper`) or small ones (`small`), from which every file in configs/ starts."""

import functools
import math
from typing import Any

from ml_collections import ConfigDict

from iumad_jax.errors import UserError

_LIMITS = {
    "seed": (0, 4_000_000),  # grain's seeds have 32 bits and begin at 1000 times this value
    "dataset.render.objects": (1, 999),
    "dataset.render.lamp": (0, 1),
    "input.size": (32, 4096),
    "input.overlap": (0, 0.5),
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
    "simplenet.noise": (0, math.inf),
    "simplenet.margin": (0, math.inf),
    "simplenet.hidden": (1, 65536),
    "simplenet.adaptor_rate": (0, math.inf),
    "simplenet.adaptor_decay": (0, math.inf),
    "simplenet.discriminator_rate": (0, math.inf),
    "simplenet.discriminator_decay": (0, math.inf),
    "simplenet.smoothing": (0, 1000),
    "destseg.student_width": (1, 4096),
    "destseg.segmentation_width": (2, 4096),
    "destseg.first_phase": (0, 1),
    "destseg.student_rate": (0, math.inf),
    "destseg.residual_rate": (0, math.inf),
    "destseg.head_rate": (0, math.inf),
    "destseg.momentum": (0, 0.9999),
    "destseg.decay": (0, math.inf),
    "destseg.gamma": (0, math.inf),
    "destseg.top": (1, 65536),
    "diffusion.latent": (1, 65536),
    "diffusion.context": (1, 65536),
    "diffusion.blocks": (1, 16),
    "diffusion.heads": (1, 1024),
    "diffusion.groups": (1, 1024),
    "diffusion.steps": (1, 900),
    "diffusion.start": (1, 999),
    "diffusion.masked.layers": (1, 64),
    "diffusion.masked.hidden": (1, 65536),
    "diffusion.masked.neighbourhood": (1, 255),
    "diffusion.masked.dropout": (0, 0.99),
    "diffusion.masked.corruption": (0, 1),
    "memory_bank.megabytes": (0.01, 100_000),
    "memory_bank.neighbourhood": (1, 256),
    "memory_bank.place": (0, 1000),
    "decisions.quantile": (0.5, 1),
    "decisions.kept_images": (1, 100_000),
    "train.epochs": (0, 10**6 - 1),
    "train.batch_size": (1, 10**6),
    "train.learning_rate": (0, math.inf),
    "train.weight_decay": (0, math.inf),
    "train.clip_norm": (0, math.inf),
    "train.drop_epoch": (1, math.inf),
    "continual.sgd_learning_rate": (0, math.inf),
    "continual.anchor": (0, 1),
    "continual.compression": (0, math.inf),
    "continual.isvd.rank": (1, 65536),
    "continual.isvd.gamma": (0, 1),
    "continual.isvd.every": (1, 10**6),
    "continual.isvd.images": (1, 10**6),
    "continual.replay.rank": (0, 10_000),
    "continual.replay.image_size": (1, 4096),
    "report.pictures_per_object": (0, 1000),
}
_MOST_TILES = 256  # of an image


def paper(protocol: str) -> ConfigDict:
    """Return the config of IB-IUMAD as published, under a protocol such as "6-1" (see `iumad_jax.protocol`)."""
    config = ConfigDict()
    config.protocol = protocol
    config.method = "ib_iumad"  # or uniad, iuf, simplenet, destseg, diad, cdad, or one of these baselines
    config.baselines = "feature_norm,gaussian,memory_bank"  # methods without training, evaluated on the same inputs
    config.combine = "published"  # of modalities: maximum or sum (of calibrated errors), rgb, depth, published
    config.score = "window16"  # of images: common (one rule for all methods), window16 (paper), own (of each method)
    config.modality = "rgb+depth"  # rgb, depth, rgb+depth
    config.seed = 0

    config.dataset = ConfigDict()
    config.dataset.name = "eyecandies"  # eyecandies, mvtec3d, folder (your images), candies, sweets (rendered)
    config.dataset.root = "data/eyecandies"
    config.dataset.objects = "all"  # all, or comma-separated names in the order of learning
    config.dataset.light = "4"  # eyecandies: 0 to 5, or all for training (light 4 for tests)
    config.dataset.validation = "train"  # mvtec3d: use validation images for train or calibration
    config.dataset.render = ConfigDict({"seed": 0, "train": 24, "val": 4, "test": 16, "size": 256})  # images
    config.dataset.render.version = 1  # of the renderer: 1, or 2, where RGB hardly shows bumps and dents
    config.dataset.render.objects = 100  # sweets: number of objects; each is the same whatever their number
    config.dataset.render.lamp = 0.0  # change of the lamps: 0, or up to 1: warmer, dimmer, from another side
    config.dataset.trust = ""  # comma-separated folders that links in the dataset may lead into, besides its root
    config.dataset.prepared = ""  # folder of prepared images; "" is the workdir

    config.input = ConfigDict()
    config.input.size = 224  # pixels
    config.input.region = ""  # part seen: left,top,right,bottom in shares of the sides or in pixels; or workpiece
    config.input.tiles = "1x1"  # ROWSxCOLUMNS of tiles, each of which the network sees in its whole input
    config.input.overlap = 0.2  # of neighbouring tiles, in their sides
    config.input.depth_encoding = "normals"  # normals, height, height+normals, xyz_uint8, normals_official
    config.input.resident = "auto"  # training images in device memory: auto (up to a quarter of it), always, never

    config.backbone = ConfigDict()
    config.backbone.name = "efficientnet_lite0"  # or _lite1, _lite2; with weights: keys of models.backbone.BACKBONES
    config.backbone.weights = ""  # path of a .pth or .safetensors file; "" is the installed package with Lite's weights
    config.backbone.grid = 14  # tokens per side
    config.backbone.levels = ""  # joined strides such as 8,16, or dinov2's blocks such as 11; "" is the default

    config.model = ConfigDict()
    config.model.width = 256  # of tokens and queries
    config.model.heads = 8  # of attention
    config.model.layers = 4  # of the Mamba decoder or class network, and of the transformer's encoder and decoder each
    config.model.hidden = 1024  # width of feed-forward layers
    config.model.dtype = "float32"  # bfloat16: networks compute in it, except those of simplenet and destseg
    config.model.dropout = 0.1
    config.model.patch_size = 8  # side of a patch in the Mamba decoder's stem, pixels
    config.model.states = 16  # states per channel of the selective scan
    config.model.scan = ""  # selective scan: reference, xla, mosaic; "" chooses for the device
    config.model.class_grid = 56  # input side of iuf's class network, pixels
    config.model.mamba = True  # False removes the Mamba decoder, which recognises the object (ablation)
    config.model.detach_condition = True  # reconstruction losses do not train the Mamba decoder or class network
    config.model.fusion = "attention"  # attention between modalities, or addition (ablation)
    config.model.bottleneck = True  # False uses the fused features as reconstruction (ablation)
    config.model.bottleneck_ratio = 2 / 3  # width of the bottleneck over that of the fused features
    config.model.kl = True  # False removes the KL term of the bottleneck loss (ablation)
    config.model.target = "rgb"  # features to reconstruct from two modalities: rgb (paper), both, depth
    config.model.standardise = False  # True z-scores features by statistics of the base step
    config.model.jitter = ConfigDict({"scale": 20.0, "probability": 1.0})  # noise on tokens, in training
    config.model.fusion_weight = 1.0  # weight of the reconstruction loss
    config.model.object_weight = 1.0  # weight of the object classification loss
    config.model.ib_weight = 1.0  # weight of the bottleneck loss
    config.model.ib_head_weight = 1.0  # weight of the classification heads within the bottleneck loss
    config.model.aux_reconstruction_weight = 0.0  # weight of the reconstruction loss of each modality alone

    config.simplenet = ConfigDict()
    config.simplenet.levels = "8,16"  # of the backbone's levels (backbone.levels), those that are used
    config.simplenet.aggregation = "mean"  # of 3 x 3 neighbours, by channel; release: as released, from images
    config.simplenet.fusion = "late"  # a discriminator per modality; early: one for both
    config.simplenet.standardise = True  # z-score features; False as published, for WideResNet50-2 with noise 0.015
    config.simplenet.noise = 0.5  # standard deviation of the noise that makes features anomalous; by `choose`
    config.simplenet.margin = 0.5  # of the hinge loss
    config.simplenet.hidden = 1024  # width of the discriminator
    config.simplenet.adaptor_rate = 1e-4  # learning rates, times the schedule's factor
    config.simplenet.adaptor_decay = 0.01  # weight decay of AdamW
    config.simplenet.discriminator_rate = 2e-4
    config.simplenet.discriminator_decay = 1e-5  # L2 penalty in Adam's gradient
    config.simplenet.smoothing = 4.0  # combine published: standard deviation of the Gaussian filter of maps, pixels

    config.destseg = ConfigDict()
    config.destseg.student_width = 64  # channels of the student's stem
    config.destseg.segmentation_width = 256  # channels of the segmentation network
    config.destseg.norm = "batch"  # batch, or group, which has no statistics that later steps overwrite
    config.destseg.standardise = True  # z-score the teacher's features; False as published, for ResNet18
    config.destseg.first_phase = 0.2  # share of a step's updates that train the student, before the segmentation
    config.destseg.student_rate = 0.4  # learning rates, times the schedule's factor
    config.destseg.residual_rate = 0.1  # of the segmentation network's residual blocks
    config.destseg.head_rate = 0.01  # of what follows them
    config.destseg.momentum = 0.9
    config.destseg.decay = 1e-4  # L2 penalty in the gradient
    config.destseg.gamma = 4.0  # exponent of the focal loss
    config.destseg.textures = ""  # folder of photographs of textures, such as DTD; "" draws textures
    config.destseg.map = "segmentation"  # or distance, between teacher and student (ablation)
    config.destseg.top = 100  # score own: number of pixels that it averages, of 256 x 256

    config.diffusion = ConfigDict()  # of diad and cdad
    config.diffusion.space = "pixels"  # what diffusion rebuilds: pixels, or features of the backbone
    config.diffusion.weights = ""  # pixels: Stable Diffusion 1.5, a .safetensors or .ckpt file or a diffusers folder
    config.diffusion.autoencoder = ""  # pixels: another autoencoder (KL-f8); "" is that of the weights
    config.diffusion.autoencoder_channels = "128,256,512,512"  # pixels: of the autoencoder's levels
    config.diffusion.context = 768  # pixels: width of the text encoder
    config.diffusion.pixels = "symmetric"  # what the autoencoder receives: -1 to 1, or imagenet, as both releases
    config.diffusion.compare = "autoencoded"  # pixels: rebuilt images with autoencoded ones, or with the input
    config.diffusion.latent = 4  # channels of a latent; in features, principal components
    config.diffusion.channels = "320,640,1280,1280"  # of the UNet's levels, each with half the side of the one before
    config.diffusion.blocks = 2  # residual blocks of a level on the way down; one more on the way up
    config.diffusion.attending = "0,1,2"  # levels with transformers, from 0; the middle always has one
    config.diffusion.heads = 8  # of attention
    config.diffusion.groups = 32  # of group norm
    config.diffusion.prediction = "noise"  # what the UNet predicts: noise, or v
    config.diffusion.steps = 10  # of sampling; 1 predicts the image at once
    config.diffusion.start = 999  # level of the noise that an image gets before sampling, up to 999
    config.diffusion.remat = False  # True recomputes the UNet's blocks for gradients, which saves memory
    config.diffusion.sff = True  # diad: spatial-aware fusion; False as released, where its weights stay zero
    config.diffusion.masked = ConfigDict()  # cdad: the anomaly-masked network
    config.diffusion.masked.layers = 8
    config.diffusion.masked.hidden = 1025  # width of feed-forward layers
    config.diffusion.masked.neighbourhood = 7  # side of what attention hides, in tokens; odd
    config.diffusion.masked.dropout = 0.1
    config.diffusion.masked.corruption = 0.5  # probability that an image is corrupted in an update
    config.diffusion.masked.target_gradient = True  # whether the masked loss also trains the clean features

    config.memory_bank = ConfigDict()
    config.memory_bank.megabytes = 4.0  # size of an object's patches, of all modalities together
    config.memory_bank.neighbourhood = 1  # side of the square over which tokens are averaged
    config.memory_bank.place = 0.0  # weight of the distance in the image, in sides; 0 compares patches from anywhere

    config.train = ConfigDict()
    config.train.epochs = 800  # per step
    config.train.optimizer = "adamw"  # adamw, sgd
    config.train.batch_size = 24  # images per update, over all devices
    config.train.learning_rate = 1e-4
    config.train.weight_decay = 1e-4
    config.train.clip_norm = 0.1  # largest global norm of a gradient
    config.train.schedule = "step"  # step, or cosine with warm-up and decay to zero in each step
    config.train.drop_epoch = 800  # schedule step: epoch after which the learning rate is divided by 10

    config.continual = ConfigDict()
    config.continual.strategy = "iuf"  # iuf, finetune, replay, isvd; joint is not incremental (upper bound)
    config.continual.optimizer = "adamw"  # optimiser after the base step: adamw, or sgd as in IUF's release
    config.continual.sgd_learning_rate = 1.0  # learning rate of this sgd; adamw uses train.learning_rate
    config.continual.anchor = 0.05  # iuf: share by which every update pulls weights back to those before the step
    config.continual.projection = True  # iuf: project updates away from directions that old objects use
    config.continual.compression = 10.0  # iuf: weight of the base step's loss that frees directions for new objects
    config.continual.isvd = ConfigDict()
    config.continual.isvd.rank = 512  # directions of a layer's inputs that are protected, at most
    config.continual.isvd.gamma = 0.99  # share of the energy of an object's inputs that is protected
    config.continual.isvd.every = 10  # one in so many training images is looked at,
    config.continual.isvd.images = 32  # and at most so many of an object
    config.continual.isvd.freeze_rest = True  # later steps train protected layers alone
    config.continual.replay = ConfigDict()
    config.continual.replay.rank = 8  # principal directions stored per object
    config.continual.replay.image_size = 56  # side of the stored coarse images, pixels
    config.continual.replay.residual = False  # add noise of what the directions leave out to drawn samples
    config.decisions = ConfigDict({"quantile": 0.995})  # share of good images below the threshold
    config.decisions.kept_images = 32  # calibration images of an object that a run keeps for later steps, at most
    config.snapshots = ConfigDict({"every_minutes": 5.0})  # between snapshots within a step
    config.debug = ConfigDict({"nans": False})  # True reports the operation that yields NaN or infinity (slow)
    config.report = ConfigDict({"pictures_per_object": 6, "tensorboard": False})  # tensorboard needs tensorboardX
    return config


def small(protocol: str) -> ConfigDict:
    """Return a small config, for few images, 2 CPU cores and a few minutes."""
    config = paper(protocol)
    config.combine = "maximum"
    config.score = "common"
    config.model.target = "both"
    config.model.width = 128
    config.model.hidden = 512
    config.model.heads = 4
    config.model.layers = 1
    config.model.patch_size = 16
    config.model.dropout = 0.0  # with few updates, jitter regularises enough
    config.model.jitter.scale = 5.0
    config.model.standardise = True  # or few updates learn only the strongest channels
    config.model.ib_weight = 0.001  # 1 would dominate the loss `fusion`, a mean over elements
    config.simplenet.hidden = 256
    config.simplenet.adaptor_rate = 1e-3
    config.simplenet.discriminator_rate = 2e-3
    config.destseg.student_width = 16
    config.destseg.segmentation_width = 64
    config.diffusion.space = "features"
    config.diffusion.latent = 64
    config.diffusion.channels = "64,128,128"
    config.diffusion.blocks = 1
    config.diffusion.attending = "1,2"
    config.diffusion.heads = 4
    config.diffusion.prediction = "v"  # learns the guide's part much sooner than "noise"
    config.diffusion.masked.layers = 4
    config.diffusion.masked.hidden = 256
    config.diffusion.masked.neighbourhood = 3
    config.train.epochs = 20
    config.train.batch_size = 8
    config.train.learning_rate = 2e-3
    config.train.schedule = "cosine"
    config.continual.strategy = "replay"  # forgets least (configs/RESULTS.md, "Who forgets what")
    config.continual.anchor = 0.01  # 0.05 prevents learning new objects at this learning rate
    return config


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries; keys are joined by dots."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def check(config: ConfigDict) -> None:
    """Check keys and ranges.

    Raises:
        UserError: If a key is unknown, or a value is out of range.
    """
    valid_keys, keys = flat(paper("1-0").to_dict()), flat(config.to_dict())
    if missing := [key for key in valid_keys if keys.get(key) is None]:
        raise UserError(f"config.{missing[0]} is missing; start the config from iumad_jax.config.paper or small.")
    for key in keys:
        if key not in valid_keys and not key.startswith("benchmark."):
            raise UserError(f"config.{key} is not a key of this version; use the keys in iumad_jax/config.py.")
    for key, (low, high) in _LIMITS.items():
        value = functools.reduce(lambda group, name: group[name], key.split("."), config)
        if not low <= value <= high:  # includes NaN
            raise UserError(f"config.{key} is {value}; use {low} to {high}.")
    if region_numbers(config.input.region) is None and config.input.region and "depth" not in modalities(config):
        raise UserError(
            f"config.input.region is {config.input.region}, which depth tells, but config.modality is"
            f" {config.modality}; use left,top,right,bottom."
        )
    tile_numbers(config.input.tiles)
    if config.input.resident not in ("auto", "always", "never"):
        raise UserError(f'config.input.resident is "{config.input.resident}"; use auto, always or never.')
    if config.method == "destseg" and config.destseg.norm == "batch" and config.train.batch_size == 1:
        raise UserError(
            "config.train.batch_size is 1, which destseg's batch norm cannot normalise; use 2 or more, or"
            " --config.destseg.norm=group."
        )
    if config.method == "destseg" and config.destseg.textures and config.modality == "depth":
        raise UserError(
            "config.destseg.textures is a folder of photographs, but config.modality is depth, whose defects have none;"
            " remove one of the two."
        )
    model = config.model
    if model.width % 2 or model.width % model.heads:
        raise UserError(
            f"config.model.width is {model.width}; use an even multiple of config.model.heads, which is {model.heads}."
        )
    if config.method == "iuf" and model.width % 4:
        raise UserError(f"config.model.width is {model.width}; use a multiple of 4, the heads of iuf's class network.")
    if config.method == "uniad" and config.backbone.grid < 8:
        raise UserError(
            f"config.backbone.grid is {config.backbone.grid}, where uniad's mask of 7 x 7 tokens hides every token; use"
            " 8 or more."
        )
    if model.patch_size > config.input.size:
        raise UserError(
            f"config.model.patch_size is {model.patch_size}; use at most config.input.size, which is"
            f" {config.input.size}."
        )


def region_numbers(region: str) -> tuple[float, float, float, float] | None:
    """Return left, top, right and bottom of a region, see `config.input.region`; None if it is "" or "workpiece".

    They are shares of the image's sides if none exceeds 1, else pixels. The right column and the bottom row are not
    part of the region.

    Raises:
        UserError: If they are not four such numbers, in order.
    """
    if region in ("", "workpiece"):
        return None
    try:
        left, top, right, bottom = map(float, region.split(","))
        pixels = max(right, bottom) > 1
        valid = 0 <= left < right < math.inf and 0 <= top < bottom < math.inf
        if valid and all(not pixels or number.is_integer() for number in (left, top, right, bottom)):
            return left, top, right, bottom
    except ValueError:
        pass
    raise UserError(
        f'config.input.region is "{region}"; use left,top,right,bottom, such as 0.25,0,0.75,1 (shares of the sides) or'
        " 400,0,1200,800 (pixels), or workpiece."
    )


def tile_numbers(tiles: str) -> tuple[int, int]:
    """Return the numbers of rows and columns of `config.input.tiles`.

    Raises:
        UserError: If they are not two numbers of which at least one tile and at most 256 follow.
    """
    rows, _, columns = tiles.partition("x")
    if len(tiles) < 10 and rows.isdecimal() and columns.isdecimal() and 0 < int(rows) * int(columns) <= _MOST_TILES:
        return int(rows), int(columns)
    raise UserError(
        f'config.input.tiles is "{tiles}"; use ROWSxCOLUMNS, such as 2x3, with at most {_MOST_TILES} tiles.'
    )


def refuse_tiles(config: ConfigDict, what: str) -> None:
    """Raise a UserError if the run of a config divides its images into tiles.

    Args:
        config: Config of the run.
        what: What needs whole images, such as "export makes a file".
    """
    if tile_numbers(config.input.tiles) != (1, 1):
        raise UserError(
            f"config.input.tiles is {config.input.tiles}, but {what} for images that are seen whole; use"
            " predict, evaluate or Detector, which join tiles."
        )


def modalities(config: ConfigDict) -> tuple[str, ...]:
    """Return the modalities of `config.modality`.

    Raises:
        UserError: If the value is unknown.
    """
    if config.modality not in ("rgb", "depth", "rgb+depth"):
        raise UserError(f'config.modality is "{config.modality}"; use rgb, depth or rgb+depth.')
    return tuple(config.modality.split("+"))


def keeps_foreground(config: ConfigDict) -> bool:
    """Return whether the config's method trains on synthetic defects that lie on objects, which depth tells."""
    return config.method == "destseg" and "depth" in modalities(config)
