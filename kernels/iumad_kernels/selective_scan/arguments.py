"""Arguments of the implementations: arrays with a batch axis, arrays without a batch axis, and options."""

from typing import NamedTuple

from jax import Array


class Sequences(NamedTuple):
    """Arrays with a leading batch axis, see `selective_scan`. B and C always have an axis of groups."""

    x: Array
    delta: Array
    B: Array
    C: Array
    z: Array | None = None
    initial_state: Array | None = None


class Parameters(NamedTuple):
    """Arrays that all sequences share."""

    A: Array
    D: Array | None = None
    delta_bias: Array | None = None


class Options(NamedTuple):
    """Options that are fixed when the scan is compiled."""

    delta_softplus: bool = True
    reverse: bool = False


def split_arguments(arrays: dict[str, Array]) -> tuple[Sequences, Parameters]:
    """Split arrays, by name, into those of the sequences and the shared parameters."""
    sequences = {name: array for name, array in arrays.items() if name in Sequences._fields}
    parameters = {name: array for name, array in arrays.items() if name not in sequences}
    return Sequences(**sequences), Parameters(**parameters)
