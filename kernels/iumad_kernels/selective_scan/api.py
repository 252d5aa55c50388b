"""Public function of the selective scan, which checks the arguments and chooses an implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from iumad_kernels.selective_scan import pallas_mosaic, reference, xla
from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences, split_arguments

IMPLEMENTATIONS: dict[str, Callable[[Sequences, Parameters, Options], tuple[Array, Array]]] = {
    "mosaic": pallas_mosaic.selective_scan,
    "reference": reference.selective_scan,
    "xla": xla.selective_scan,
}


def selective_scan(
    x: ArrayLike,
    delta: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    z: ArrayLike | None = None,
    delta_bias: ArrayLike | None = None,
    *,
    delta_softplus: bool = True,
    initial_state: ArrayLike | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Compute the selective state-space scan of Mamba (S6).

        d_t = softplus(delta_t + delta_bias)                  (delta_t + delta_bias if not delta_softplus)
        h_t = exp(d_t A) h_{t-1} + d_t x_t B_t                (channels, states), h_0 = initial_state or 0
        y_t = sum_n C_t h_t + D x_t, times SiLU(z_t) if z is given

    The arguments may be float16, bfloat16, float32 or float64. The scan computes in float64 if x is float64, otherwise
    in float32.
    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), Algorithm 2.

    The function supports `jit`, `vmap` (the new axis joins the batch), `pmap`, `shard_map` and `grad`. Second
    derivatives are those of "reference". Forward-mode differentiation raises a TypeError except with
    `implementation="reference"`.

    Args:
        x: Sequences, (batch, length, channels).
        delta: Step sizes, (batch, length, channels).
        A: Decay rates, negative, (channels, states).
        B: Input projections, (batch, length, groups, states), or (batch, length, states) for one group. Group g
            belongs to the g-th run of channels / groups neighbouring channels.
        C: Output projections, same shape as B.
        D: Weights of the skip connection, (channels,).
        z: Gates, (batch, length, channels).
        delta_bias: Bias of delta, (channels,).
        delta_softplus: Whether softplus makes the step sizes positive.
        initial_state: State before the first position read, (batch, channels, states).
        return_final_state: Whether to also return the state after the last position read.
        reverse: Whether to read the sequences from end to start.
        implementation: "mosaic" (Pallas kernels for NVIDIA Hopper and newer; the default where they can run), "xla"
            (chunks of positions; the default elsewhere) or "reference" (one position at a time). The first two have
            hand-written backward passes. The default depends on JAX's default backend; name an implementation if the
            computation runs on another backend.

    Returns:
        y, (batch, length, channels), in the dtype of x. If return_final_state, also the final state,
        (batch, channels, states), in float64 if x is float64, otherwise in float32.

    Raises:
        ValueError: If a shape, a dtype or the name of the implementation is invalid, or if the named implementation
            cannot run on this machine.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be one of {sorted(IMPLEMENTATIONS)}; got {implementation!r}")
    arguments = {
        "x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    arrays = {name: jnp.asarray(value) for name, value in arguments.items() if value is not None}
    _check_arrays(arrays)
    for name in ("B", "C"):
        if arrays[name].ndim == 3:
            arrays[name] = arrays[name][:, :, None]
    obstacle = pallas_mosaic.obstacle(arrays["x"].dtype, arrays["A"].shape[1])
    if implementation is None:
        implementation = "xla" if obstacle else "mosaic"
    if implementation == "mosaic" and obstacle:
        raise ValueError(f'implementation "mosaic" cannot run: {obstacle}')
    if arrays["x"].size == 0:
        implementation = "reference"
    y, final_state = _scan(*split_arguments(arrays), Options(delta_softplus, reverse), implementation)
    return (y, final_state) if return_final_state else y


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scan(sequences: Sequences, parameters: Parameters, options: Options, implementation: str) -> tuple[Array, Array]:
    return IMPLEMENTATIONS[implementation](sequences, parameters, options)


def _check_arrays(arrays: dict[str, Array]) -> None:
    """Raise a ValueError if an array has an invalid dtype or shape."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating-point; got {array.dtype}")
    x, A, B = arrays["x"], arrays["A"], arrays["B"]
    if x.ndim != 3:
        raise ValueError(f"x must have the shape (batch, length, channels); got {x.shape}")
    batch, length, channels = x.shape
    if length == 0:
        raise ValueError(f"x must have at least one position; got shape {x.shape}")
    if A.ndim != 2 or A.shape[0] != channels or not 1 <= A.shape[1] <= 256:
        raise ValueError(f"A must have the shape ({channels}, states) with 1 to 256 states; got {A.shape}")
    states = A.shape[1]
    if B.ndim not in (3, 4) or B.shape[:2] != (batch, length) or B.shape[-1] != states:
        expected = f"({batch}, {length}, groups, {states}) or ({batch}, {length}, {states})"
        raise ValueError(f"B must have the shape {expected}; got {B.shape}")
    groups = B.shape[2] if B.ndim == 4 else 1
    if groups == 0 or channels % groups:
        raise ValueError(f"B's groups must divide the {channels} channels evenly; got {groups}")
    expected_shapes = {
        "delta": x.shape,
        "C": B.shape,
        "D": (channels,),
        "z": x.shape,
        "delta_bias": (channels,),
        "initial_state": (batch, channels, states),
    }
    for name, shape in expected_shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{name} must have the shape {shape}; got {arrays[name].shape}")
