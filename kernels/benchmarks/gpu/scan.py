"""Times of the selective scan, of two scans of JAX and of installed peers, and of the scan in segments."""

import functools
from collections.abc import Callable, Iterator
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
Contestants = Callable[[Shape], dict[str, Any]]  # functions that make the programs, by name
# Each sequence takes 16 blocks of threads. The first two shapes are cut into 4 segments by default.
CUT_SHAPES = ["1x256x2048x16x1", "2x1024x2048x16x1", "4x256x2048x16x1", "4x1024x2048x16x1", "4x4096x2048x16x1"]
SEGMENTS = (1, 4)
MEMORY = 8  # largest temporary memory of a contestant, in GiB


def cases(options: Options) -> Cases:
    """Yield the rates of the device, then one row per shape and contestant, the most important shapes first."""
    lists = ["1x5x4x2x1"] if options.rehearse else ["target", "es2d"]
    cut_shapes = ["1x8x4x1x1"] if options.rehearse else CUT_SHAPES
    seconds = 0.0 if options.rehearse else 1.0
    own_and_jax = functools.partial(selective_scan.jax_contestants, dtype=jnp.float32)
    peers, left_out = selective_scan.peers()
    yield "rates", machine.rates
    for name, reason in left_out.items():
        yield name, functools.partial(dict, left_out=reason)

    def cases_of(names: list[str], contestants: Contestants) -> Cases:
        for shape in selective_scan.parse_shapes(",".join(names)):
            for name, make_program in contestants(shape).items():
                yield f"{_key(shape)} {name}", functools.partial(measure, shape, {name: make_program}, seconds)

    yield from cases_of(lists, own_and_jax)
    for shape in map(selective_scan.parse_shape, cut_shapes):
        if "mosaic" not in own_and_jax(shape):
            continue
        for number in SEGMENTS[:1] if options.rehearse else SEGMENTS:
            name = f"mosaic, {number} segments" if number > 1 else "mosaic, uncut"
            make_program = baselines.jax_program(functools.partial(scan_in_segments, number))
            yield f"{_key(shape)} {name}", functools.partial(measure, shape, {name: make_program}, seconds)
    if not options.rehearse:
        yield from cases_of(["target"], lambda _: peers)  # which take half a minute each to compile
        yield from cases_of(["wide", "long"], own_and_jax)


def measure(shape: Shape, contestant: dict[str, Any], seconds: float) -> Row:
    """Measure both passes of one contestant, whose results must agree with those of "xla"."""
    # "xla" has no expected results: computing them would compile it before its compilation is measured.
    expected = {} if "xla" in contestant else dict(expected_results(shape))
    return {"timed": selective_scan.measure(shape, jnp.float32, contestant, seconds, MEMORY, expected)}


@functools.lru_cache(maxsize=1)  # the contestants of a shape follow each other
def expected_results(shape: Shape) -> dict[str, Any]:
    """Compute the results of "xla" by pass."""
    args = selective_scan.random_inputs(shape, jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(args["x"].shape, np.float32))
    program = selective_scan.jax_contestants(shape, jnp.float32)["xla"](args, dy, backward=True)
    y, gradients = jax.tree.map(np.asarray, program.results(program.wait_for(program.run())))
    return {"forward": y, "forward + backward": (y, gradients)}


def scan_in_segments(number: int, **args: Any) -> jax.Array:
    """Run the Mosaic kernels with this number of segments."""
    batch, length, channels = args["x"].shape
    tiling = Tiling(length, channels, *args["B"].shape[2:])
    with _pretended_processors(processors=number * batch * tiling.groups * tiling.blocks_per_group):
        return pallas_mosaic.selective_scan(*arguments.split_arguments(args), arguments.Options())[0]


@contextmanager
def _pretended_processors(processors: int) -> Iterator[None]:
    """Set the number of processors that the kernels assume while they are traced."""
    before, pallas_mosaic.PROCESSORS = pallas_mosaic.PROCESSORS, processors
    try:
        yield
    finally:
        pallas_mosaic.PROCESSORS = before


def _key(shape: Shape) -> str:
    return "x".join(map(str, shape))
