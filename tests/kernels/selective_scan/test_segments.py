"""Parallel scan of segments against loops in numpy over the whole sequence, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan import pallas_mosaic, xla
from iumad_kernels.selective_scan.arguments import Options
from iumad_kernels.selective_scan.rules import differentiable
from iumad_kernels.selective_scan.segments import segmented_passes


def scan_in_segments(sequences, parameters, options, number):
    """Scan in number(batch) segments."""
    passes = segmented_passes(xla._forward, xla._backward, lambda x, B: number(len(x)), options)
    return differentiable(*passes, None)(sequences, parameters)


@pytest.mark.parametrize(
    ("without", "delta_softplus", "reverse"),
    [((), True, False), (("z", "initial_state"), True, True), (("D", "delta_bias"), False, True)],
)
def test_segments_give_the_scan_of_the_whole_sequence(exact, without, delta_softplus, reverse):
    args = exact.arguments(2, 9, 4, 3, 2, dtype=np.float32, without=without)
    scan = functools.partial(scan_in_segments, number=lambda batch: 3)
    exact.check(scan, args, Options(delta_softplus, reverse))


def test_under_vmap_the_joined_batch_is_cut(exact):
    def vmapped(sequences, parameters, options):
        def scan(sequence):
            batch = jax.tree.map(lambda array: array[None], sequence)
            y, h = scan_in_segments(batch, parameters, options, number={1: 1, 4: 2}.get)
            return y[0], h[0]

        return jax.vmap(scan)(sequences)

    exact.check(vmapped, exact.arguments(4, 6, 4, 3, 2, dtype=np.float32))


@pytest.mark.parametrize(
    ("number", "batch", "length", "channels", "states", "groups"),
    [
        (16, 1, 1024, 512, 16, 1),  # segments of 64 positions
        (32, 1, 65536, 512, 16, 1),  # 4 blocks of threads for each segment
        (8, 4, 1024, 512, 16, 1),
        (5, 1, 1000, 512, 16, 1),
        (1, 1, 1021, 512, 16, 1),
        (1, 1, 192, 512, 16, 1),  # 3 segments would gain little
        (1, 4, 1024, 512, 128, 1),
        (1, 24, 784, 2048, 16, 4),
    ],
)
def test_idle_processors_determine_the_number_of_segments(number, batch, length, channels, states, groups):
    x = jax.ShapeDtypeStruct((batch, length, channels), jnp.float32)
    B = jax.ShapeDtypeStruct((batch, length, groups, states), jnp.float32)
    assert pallas_mosaic._number_of_segments(x, B) == number


@pytest.mark.usefixtures("interpreted")
def test_segments_with_the_mosaic_kernels(exact, monkeypatch):
    monkeypatch.setattr(pallas_mosaic, "MIN_SEGMENT", 8)
    args = exact.arguments(1, 32, 4, 4, dtype=np.float32)
    assert pallas_mosaic._number_of_segments(args["x"], args["B"]) == 4
    exact.check(pallas_mosaic.selective_scan, args)
