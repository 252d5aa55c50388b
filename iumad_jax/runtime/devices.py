"""Data parallelism: the devices of all processes share each batch (`jax.pmap`).

Results do not depend on the number of devices.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"


def memory_per_device() -> float:
    """Return the bytes that JAX may use on each device; on CPU, a device's share of the available RAM."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return psutil.virtual_memory().available / len(devices)
    return min((device.memory_stats() or {"bytes_limit": 0})["bytes_limit"] for device in devices)


def updates_per_loop(per_epoch: int, limit: int = 128) -> int:
    """Choose the number of updates in one loop on a device: the largest divisor of an epoch up to the limit.

    On CPU it is 1, because an update takes almost twice as long within a loop.
    """
    if jax.local_devices()[0].platform == "cpu":
        return 1
    return max(number for number in range(1, limit + 1) if per_epoch % number == 0)


def data_parallel(update: Callable) -> Callable:
    """Compile update(state, batch, key, ...) for all devices, each with its share of the batch.

    All devices receive the same further arguments. The old state is donated.
    """
    shared = len(inspect.signature(update).parameters) - 2
    return jax.pmap(update, axis_name=AXIS, in_axes=(0, 0, *(None,) * shared), donate_argnums=0)


def on_one_device(update: Callable) -> Callable:
    """Emulate `data_parallel` for inspection: one state, the same shares of the batch, no communication."""
    shared = len(inspect.signature(update).parameters) - 2
    return jax.vmap(update, in_axes=(None, 0, *(None,) * shared), axis_name=AXIS)


def replicate(tree: Any) -> Any:
    """Copy every array to every device, with the layout of `data_parallel` results, which avoids recompilation."""
    devices = jax.local_devices()
    layout = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(lambda a: jax.device_put(np.broadcast_to(a, (len(devices), *np.shape(a))), layout), tree)


def unreplicate(tree: Any) -> Any:
    """Return the first device's copy of every array as a NumPy array."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_shards[0].data)[0], tree)


def shapes_on_a_device(tree: Any) -> Any:
    """Return the shape of each array's copy on one device."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tree)


def split_indices(rows: np.ndarray) -> np.ndarray:
    """Split the rows of a batch among all devices, and return the shares of this process's devices.

    Args:
        rows: Indices of images, shape (..., batch).

    Returns:
        Shape (devices, ..., places). All devices have the same number of places. If there are more places than rows,
        the last places repeat the first row, and `sample_weight` gives them the weight 0.
    """
    fill = -rows.shape[-1] % jax.device_count()
    filled = np.concatenate([rows, np.repeat(rows[..., :1], fill, axis=-1)], axis=-1)
    return _select_local(filled.reshape(*rows.shape[:-1], jax.device_count(), -1))


def sample_weight(batch_size: int) -> np.ndarray | None:
    """Compute the weight of the image at each place of `split_indices` in its device's mean.

    With these weights, the mean over devices of their means is the mean over the batch.

    Returns:
        Shape (devices, places), or None if all images count equally.
    """
    fill = -batch_size % jax.device_count()
    if not fill:
        return None
    weights = np.zeros(batch_size + fill, np.float32)
    weights[:batch_size] = len(weights) / batch_size
    return _select_local(weights.reshape(jax.device_count(), -1))


def _select_local(by_device: np.ndarray) -> np.ndarray:
    """Select this process's devices from (..., all devices, places), and move their axis to the front."""
    first = jax.process_index() * jax.local_device_count()
    return np.moveaxis(by_device, -2, 0)[first : first + jax.local_device_count()]


def image_keys(key: jax.Array, images: int) -> jax.Array:
    """Derive one key for each of this device's images. Must be called within `data_parallel`.

    The key depends on the image's place in the whole batch, so results do not depend on the number of devices.
    """
    devices = jax.lax.axis_size(AXIS)
    return jax.random.split(key, (devices, images))[jax.lax.axis_index(AXIS)]


def mean_over_devices(tree: Any) -> Any:
    """Average every array over the devices. Must be called within `data_parallel`."""
    return jax.lax.pmean(tree, AXIS)


def gather(rows: jax.Array, sample_weight: jax.Array | None) -> tuple[jax.Array, int | jax.Array]:
    """Gather the rows of all devices on every device. Must be called within `data_parallel`.

    If every device computes the same loss from the gathered rows, the mean of their gradients is its gradient.

    Returns:
        The rows in the order of the whole batch, and their number. The rows of repeated images come last and are zero.
    """
    if sample_weight is not None:
        rows = rows * (sample_weight > 0)[:, None]
    return jax.lax.all_gather(rows, AXIS, tiled=True), image_count(len(rows), sample_weight)


def image_count(places: int, sample_weight: jax.Array | None) -> int | jax.Array:
    """Count the images of a batch on all devices, without repeated ones. Must be called within `data_parallel`.

    Args:
        places: Number of images on each device.
        sample_weight: Their weights, see `sample_weight`.
    """
    if sample_weight is None:
        return places * jax.lax.axis_size(AXIS)
    return jax.lax.psum(jnp.sum(sample_weight > 0), AXIS)
