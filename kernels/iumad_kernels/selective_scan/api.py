"""The selective scan's one public function: checks its arguments and chooses an implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from iumad_kernels.selective_scan import reference, xla

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
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
) -> Array | tuple[Array, Array]:
    """The selective state-space scan of Mamba (S6).

        d_t = softplus(delta_t + delta_bias)                  (the sum itself if not delta_softplus)
        h_t = exp(d_t A) h_{t-1} + d_t x_t B_t                (E, N), h_0 = initial_state or 0
        y_t = sum_n C_t h_t + D x_t, times SiLU(z_t) if z is given

    in float32 (float64 where x is), whatever the dtypes of the arguments: float16, bfloat16, float32 or float64.
    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), Algorithm 2.

    Works under `jit`, `vmap`, `pmap`, `shard_map` and `grad`, also twice. Forward-mode differentiation raises a
    TypeError except with `implementation="reference"`.

    Args:
        x: the sequences, (batch, length, channels).
        delta: step sizes, (batch, length, channels).
        A: decay rates, negative, (channels, states).
        B: input projections, (batch, length, groups, states), or (batch, length, states) for one group. Group g
            belongs to the g-th run of channels / groups neighbouring channels.
        C: output projections, as B.
        D: the skip connection's weights, (channels,).
        z: gates, (batch, length, channels).
        delta_bias: added to delta, (channels,).
        delta_softplus: whether softplus makes the step sizes positive.
        initial_state: the state before the first position read, (batch, channels, states).
        return_final_state: whether to return the state after the last position read, too.
        reverse: whether to read the sequences from their ends to their starts.
        implementation: "xla" (chunks of positions, with its own backward pass; the default on every platform) or
            "reference" (one position at a time).

    Returns:
        y, (batch, length, channels), in the dtype of x; with return_final_state, also the final state,
        (batch, channels, states), in float32 (float64 where x is).

    Raises:
        ValueError: a shape, a dtype or the implementation's name is not one of the above.
    """
    if implementation is None:
        implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {sorted(IMPLEMENTATIONS)}; got {implementation!r}")
    arguments = {
        "x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    arrays = {name: jnp.asarray(value) for name, value in arguments.items() if value is not None}
    _check(arrays)
    for name in ("B", "C"):
        if arrays[name].ndim == 3:
            arrays[name] = arrays[name][:, :, None]
    y, final_state = IMPLEMENTATIONS[implementation](**arrays, delta_softplus=delta_softplus, reverse=reverse)
    return (y, final_state) if return_final_state else y


def _check(arrays: dict[str, Array]) -> None:
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
