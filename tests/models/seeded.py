"""Images and weights from seeds, so that golden values need neither; and the values that are kept of an output."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def seeded_images(height: int, width: int | None = None) -> np.ndarray:
    return np.random.default_rng(height).uniform(0, 255, (2, height, width or height, 3)).astype(np.float32)


def seeded_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Draw weights and statistics from seeds that depend only on the tensors' names.

    Tensors whose name contains a norm and ends with "weight", variances and layer scales are near 1.
    """
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        norm = any(part in name for part in ("_bn", ".bn", "bn1", "norm", "downsample.1"))
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith(("running_var", "gamma")) or (norm and name.endswith("weight")):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) in (2, 4):
            value = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        else:
            value = rng.normal(0, 0.3, shape)
        state[name] = value.astype(np.float32)
    return state


def sample(output: np.ndarray) -> np.ndarray:
    """Pick 64 values at fixed positions of a channels-last output."""
    return output.reshape(-1)[np.random.default_rng(output.size).integers(0, output.size, 64)]
