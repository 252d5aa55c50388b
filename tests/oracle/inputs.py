"""Sizes, weights and inputs of the networks that are compared with torch and diffusers; all numbers from seeds."""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tests.models.seeded import seeded_state

CHANNELS, GROUPS, HEADS = (8, 16, 16, 16), 4, 2
CONTEXT = 5, 6  # tokens, width
LEVELS = 1, 501, 901  # of noise
HINT = 4, 4, 8, 8  # widths
AMN_LAYERS, AMN_HIDDEN, NEIGHBOURHOOD = 2, 13, 5
TEXT = {"width": 8, "layers": 3, "heads": 2}
AUTOENCODER_SIZES = (64, 64), (44, 52)  # of images; the sides of the latter are odd at its coarser levels
LATENT_SIZES = 16, 14  # of latents
FAINT = (  # layers whose outputs are so small that the next norm's epsilon matters
    "conv_in.",
    "encoder.conv_in.",
    "decoder.conv_in.",
    "down_blocks.0.resnets.0.conv2.",
    "down_blocks.0.attentions.0.proj_in.",
    "embeddings.",
)


def state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Draw the tensors of a network by their names."""
    state = seeded_state(shapes)
    return {name: value * np.float32(1e-3 if name.startswith(FAINT) else 1) for name, value in state.items()}


def normal(name: str, *shape: int) -> np.ndarray:
    """Draw an input by its name, channels last."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def normal_tree(name: str, tree: Any) -> Any:
    """Draw parameters of a module, given their shapes; kernels keep the size of what they multiply."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: normal(f"{name}{path}", *leaf.shape) * np.float32(max(np.prod(leaf.shape[:-1]), 4) ** -0.5),
        tree,
    )


def amn_state() -> dict[str, np.ndarray]:
    """Draw all parameters of the anomaly-masked network, in the shapes of torch's layers.

    Those of the hint are twice as large as others, so that its nine convolutions do not lose the image.
    """
    d = CHANNELS[0]
    shapes: dict[str, tuple[int, ...]] = {"hint.conv_in.weight": (HINT[0], 3, 3, 3)}
    for i, (width, wider) in enumerate(itertools.pairwise(HINT)):
        shapes[f"hint.blocks.{2 * i}.weight"] = width, width, 3, 3
        shapes[f"hint.blocks.{2 * i + 1}.weight"] = wider, width, 3, 3
    shapes["hint.conv_out.weight"] = d, HINT[-1], 3, 3
    for i in range(AMN_LAYERS):
        for name in ("query", "key", "value", "out"):
            shapes |= {f"{i}.{name}.weight": (d, d), f"{i}.{name}.bias": (d,)}
        shapes |= {f"{i}.hidden.weight": (AMN_HIDDEN, d), f"{i}.hidden.bias": (AMN_HIDDEN,)}
        shapes |= {f"{i}.output.weight": (d, AMN_HIDDEN), f"{i}.output.bias": (d,)}
        shapes |= {f"{i}.norm{j}.{part}": (d,) for j in (1, 2) for part in ("weight", "bias")}
    return {name: value * (2 if name.startswith("hint") else 1) for name, value in seeded_state(shapes).items()}
