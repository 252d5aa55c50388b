"""Times one update of IB-IUMAD's training with the selective scan as it is and with `jax.lax.scan`, in turns.

python -m kernels.benchmarks.training_step [--config=quickstart] [--batch_size=8] [--seconds=120]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configs import eyecandies, quickstart
from iumad_jax import methods, parallel, train
from iumad_jax.data.pipeline import whole
from iumad_jax.models import mamba
from iumad_jax.shapes import Batch
from kernels.benchmarks import baselines

OBJECTS, CHANNELS = 10, 192
CONFIGS = {"quickstart": quickstart, "eyecandies": eyecandies}


def lax_scan(*args: jax.Array, delta_softplus: bool, **more: jax.Array) -> jax.Array:
    """In the place of `selective_scan`."""
    assert delta_softplus
    return baselines.lax_scan(*args, **more)


def random_batch(config: Any) -> Batch:
    """Of the sizes that the configuration says."""
    rng = np.random.default_rng(0)
    b, tokens, size = config.train.batch_size, config.backbone.grid**2, config.input.size
    modalities = methods.modalities(config)
    return Batch(
        {m: rng.standard_normal((b, tokens, CHANNELS)).astype(np.float32) for m in modalities},
        {m: rng.uniform(0, 255, (b, size, size, 3)).astype(np.float32) for m in modalities},
        rng.integers(0, OBJECTS, b).astype(np.int32),
    )


def prepared(config: Any, scan: Callable[..., Any]) -> Callable[[], float]:
    """An update, compiled, that returns its loss; the same one every time."""
    mamba.selective_scan = scan
    method, batch = methods.build(config.method, config, OBJECTS), random_batch(config)
    optimizer = train.make_optimizer(config.train)
    state = train.start(method.init(jax.random.key(0), batch), optimizer, 0, [])
    update = train.make_update(method, optimizer)
    piece, key, rates = whole(batch), jax.random.key(1), np.zeros(1, np.float32)

    def run() -> float:
        _, scalars = update(parallel.replicate(state), piece, key, rates)
        return float(scalars["loss"][0, 0])

    run()
    return run


def main() -> None:
    """Prints the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", choices=sorted(CONFIGS))
    parser.add_argument("--batch_size", type=int, default=0, help="that of the config if 0")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    config = CONFIGS[options.config].get_config()
    config.train.batch_size = options.batch_size or config.train.batch_size
    scans = {"selective_scan": mamba.selective_scan, "lax.scan": lax_scan}
    updates = {name: prepared(config, scan) for name, scan in scans.items()}
    times: dict[str, list[float]] = {name: [] for name in updates}
    end = time.monotonic() + options.seconds
    while len(times["lax.scan"]) < 3 or time.monotonic() < end:
        losses = []
        for name, update in updates.items():
            start = time.perf_counter()
            losses.append(update())
            times[name].append(time.perf_counter() - start)
        np.testing.assert_allclose(*losses, rtol=1e-4)
    ours, theirs = (statistics.median(times[name]) for name in scans)
    print(
        f"{options.config}, batch of {config.train.batch_size}: {ours:.3g} s an update, {theirs:.3g} s with lax.scan,"
        f" {theirs / ours:.2f} times as long (medians of {len(times['lax.scan'])} turns)"
    )


if __name__ == "__main__":
    main()
