"""Several devices share every batch (`jax.pmap`), those of all processes.

What is computed does not depend on how many there are.
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
    """Bytes that JAX may use on each device; on CPU, its share of the RAM that is available."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return psutil.virtual_memory().available / len(devices)
    return min((device.memory_stats() or {"bytes_limit": 0})["bytes_limit"] for device in devices)


def updates_per_loop(per_epoch: int, most: int = 128) -> int:
    """How many updates a device should do in one loop: an epoch, or of a long one the largest part up to `most`.

    On CPU one: there the same update takes almost twice as long in a loop.
    """
    if jax.local_devices()[0].platform == "cpu":
        return 1
    return max(number for number in range(1, most + 1) if per_epoch % number == 0)


def data_parallel(update: Callable) -> Callable:
    """Runs update(state, batch, key, ...) on every device, each with its share of the batch, the rest being shared.

    The old state is given up.
    """
    shared = len(inspect.signature(update).parameters) - 2
    return jax.pmap(update, axis_name=AXIS, in_axes=(0, 0, *(None,) * shared), donate_argnums=0)


def on_one_device(update: Callable) -> Callable:
    """The same for one copy of the state and the same shares, without any communication; to look into it."""
    shared = len(inspect.signature(update).parameters) - 2
    return jax.vmap(update, in_axes=(None, 0, *(None,) * shared), axis_name=AXIS)


def replicate(tree: Any) -> Any:
    """A copy of every array on every device, laid out as `data_parallel` returns it, so that it compiles once."""
    devices = jax.local_devices()
    layout = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(lambda a: jax.device_put(np.broadcast_to(a, (len(devices), *np.shape(a))), layout), tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of every array, as numpy arrays."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_shards[0].data)[0], tree)


def split_indices(rows: np.ndarray) -> np.ndarray:
    """What each device of this process takes of a batch's rows: (..., batch) -> (devices, ..., places).

    Every device has as many places. If they are more than rows, the last are filled with the first row once more, and
    `sample_weight` leaves them out.
    """
    fill = -rows.shape[-1] % jax.device_count()
    filled = np.concatenate([rows, np.repeat(rows[..., :1], fill, axis=-1)], axis=-1)
    return _own(filled.reshape(*rows.shape[:-1], jax.device_count(), -1))


def sample_weight(batch_size: int) -> np.ndarray | None:
    """What the image at each place counts in its device's mean: (devices, places); None: all the same.

    The mean over devices of these means is that over the batch.
    """
    fill = -batch_size % jax.device_count()
    if not fill:
        return None
    counts = np.zeros(batch_size + fill, np.float32)
    counts[:batch_size] = len(counts) / batch_size
    return _own(counts.reshape(jax.device_count(), -1))


def _own(by_device: np.ndarray) -> np.ndarray:
    """This process's part of (..., all devices, places), its devices first."""
    first = jax.process_index() * jax.local_device_count()
    return np.moveaxis(by_device, -2, 0)[first : first + jax.local_device_count()]


def image_keys(key: jax.Array, images: int) -> jax.Array:
    """Inside `data_parallel`: one key for each of this device's images.

    An image's key depends on its place in the whole batch, so that results do not depend on the number of devices.
    """
    devices = jax.lax.axis_size(AXIS)
    return jax.random.split(key, (devices, images))[jax.lax.axis_index(AXIS)]


def mean_over_devices(tree: Any) -> Any:
    """Inside `data_parallel`: the mean of every array over the devices."""
    return jax.lax.pmean(tree, AXIS)


def gather(rows: jax.Array, sample_weight: jax.Array | None) -> tuple[jax.Array, int | jax.Array]:
    """Inside `data_parallel`: the rows of all devices, in the order of the whole batch, on every device; how many.

    Behind these many, there are zeros for the places that were filled. Of a loss of the rows that every device
    computes, the mean over devices of the gradients is the gradient.
    """
    if sample_weight is not None:
        rows = rows * (sample_weight > 0)[:, None]
    gathered = jax.lax.all_gather(rows, AXIS, tiled=True)
    return gathered, len(gathered) if sample_weight is None else jax.lax.psum(jnp.sum(sample_weight > 0), AXIS)
