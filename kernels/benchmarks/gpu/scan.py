"""Times of the selective scan: ours, JAX's own two scans, other packages' where they are installed; and segments."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan import arguments, pallas_mosaic
from iumad_kernels.selective_scan.tiling import Tiling

from kernels.benchmarks import baselines, machine, selective_scan
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

Shape = tuple[int, ...]
# Of 16 and 32 blocks of threads a sequence's worth each; by default the first two are cut into 4 to 8 segments.
CUT = ["1x256x2048x16x1", "2x1024x2048x16x1", "4x256x2048x16x1", "4x1024x2048x16x1", "4x4096x2048x16x1"]
SEGMENTS = (1, 4)
MEMORY = 8  # GiB that a contestant may need


def cases(options: Options) -> Cases:
    """How fast the device is, then a row for each shape and contestant, the most telling shapes first."""
    lists = ["1x5x4x2x1"] if options.rehearse else ["target", "es2d", "wide"]
    cut = ["1x8x4x1x1"] if options.rehearse else CUT
    seconds = 0.0 if options.rehearse else 1.0
    peers, left_out = selective_scan.peers()
    yield "rates", machine.rates
    for name, reason in left_out.items():
        yield name, functools.partial(dict, left_out=reason)

    def of_shapes(names: list[str]) -> Cases:
        for shape in selective_scan.parse_shapes(",".join(names)):
            for name, prepare in (selective_scan.contestants(shape, jnp.float32) | peers).items():
                yield f"{_key(shape)} {name}", functools.partial(time, shape, {name: prepare}, seconds)

    yield from of_shapes(lists)
    for shape in map(selective_scan.parse_shape, cut):
        if "mosaic" not in selective_scan.contestants(shape, jnp.float32):
            continue
        for number in SEGMENTS[:1] if options.rehearse else SEGMENTS:
            name = f"mosaic, {number} segments" if number > 1 else "mosaic, uncut"
            prepare = baselines.in_jax(functools.partial(in_segments, number))
            yield f"{_key(shape)} {name}", functools.partial(time, shape, {name: prepare}, seconds)
    if not options.rehearse:
        yield from of_shapes(["long"])


def time(shape: Shape, prepare: dict[str, Any], seconds: float) -> Row:
    """Both passes of one contestant, which must find what "xla" does."""
    known = {} if "xla" in prepare else dict(expected(shape))  # "xla" itself is compiled here for the first time
    return {"timed": selective_scan.measure(shape, jnp.float32, prepare, seconds, MEMORY, known)}


@functools.lru_cache(maxsize=1)  # contestants of a shape come one after the other
def expected(shape: Shape) -> dict[str, Any]:
    """What "xla" finds, by pass."""
    args = selective_scan.inputs(shape, jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(args["x"].shape, np.float32))
    program = selective_scan.contestants(shape, jnp.float32)["xla"](args, dy, backward=True)
    y, gradients = jax.tree.map(np.asarray, program.results(program.wait_for(program.run())))
    return {"forward": y, "forward + backward": (y, gradients)}


def in_segments(number: int, **args: Any) -> jax.Array:
    """Mosaic's scan in so many segments, or uncut."""
    batch, length, channels = args["x"].shape
    tiling = Tiling(length, channels, *args["B"].shape[2:])
    with _as_if(processors=number * batch * tiling.groups * tiling.blocks_of_group):
        return pallas_mosaic.selective_scan(*arguments.grouped(args), arguments.Options())[0]


@contextmanager
def _as_if(processors: int) -> Iterator[None]:
    """Lets the kernels believe that the GPU has so many processors, while they are traced."""
    before, pallas_mosaic.PROCESSORS = pallas_mosaic.PROCESSORS, processors
    try:
        yield
    finally:
        pallas_mosaic.PROCESSORS = before


def _key(shape: Shape) -> str:
    return "x".join(map(str, shape))
