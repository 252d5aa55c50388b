"""The scan's arguments as the implementations take them: arrays with a batch axis, arrays without, and options."""

from typing import NamedTuple

from jax import Array


class Sequences(NamedTuple):
    """The arrays with a leading batch axis, as `selective_scan` explains them; B and C always have groups."""

    x: Array
    delta: Array
    B: Array
    C: Array
    z: Array | None = None
    initial_state: Array | None = None


class Parameters(NamedTuple):
    """The arrays that all sequences share."""

    A: Array
    D: Array | None = None
    delta_bias: Array | None = None


class Options(NamedTuple):
    """What is known when the scan is compiled."""

    delta_softplus: bool = True
    reverse: bool = False


def grouped(arrays: dict[str, Array]) -> tuple[Sequences, Parameters]:
    """Sorts arrays, by name, into the two groups."""
    sequences = {name: array for name, array in arrays.items() if name in Sequences._fields}
    parameters = {name: array for name, array in arrays.items() if name not in sequences}
    return Sequences(**sequences), Parameters(**parameters)
