"""The selective scan's one public function: checks its arguments and chooses an implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from iumad_kernels.selective_scan import pallas_mosaic, reference, xla
from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences, grouped

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
    """The selective state-space scan of Mamba (S6).

        d_t = softplus(delta_t + delta_bias)                  (the sum itself if not delta_softplus)
        h_t = exp(d_t A) h_{t-1} + d_t x_t B_t                (E, N), h_0 = initial_state or 0
        y_t = sum_n C_t h_t + D x_t, times SiLU(z_t) if z is given

    in float32 (float64 where x is), whatever the dtypes of the arguments: float16, bfloat16, float32 or float64.
    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), Algorithm 2.

    Works under `jit`, `vmap` (the new axis joins the batch), `pmap`, `shard_map` and `grad`, also twice (second
    derivatives are those of "reference"). Forward-mode differentiation raises a TypeError except with
    `implementation="reference"`.

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
        implementation: "mosaic" (Pallas kernels for NVIDIA Hopper and newer; the default where they can run), "xla"
            (chunks of positions; the default elsewhere) or "reference" (one position at a time). The first two have
            backward passes of their own. The default looks at JAX's default backend: for a computation on another
            one, name an implementation.

    Returns:
        y, (batch, length, channels), in the dtype of x; with return_final_state, also the final state,
        (batch, channels, states), in float32 (float64 where x is).

    Raises:
        ValueError: a shape, a dtype or the implementation's name is not one of the above, or the implementation named
            cannot run here.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
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
    obstacle = pallas_mosaic.obstacle(arrays["x"].dtype, arrays["A"].shape[1])
    if implementation is None:
        implementation = "xla" if obstacle else "mosaic"
    if implementation == "mosaic" and obstacle:
        raise ValueError(f'implementation "mosaic" cannot run: {obstacle}')
    if arrays["x"].size == 0:
        implementation = "reference"
    y, final_state = _scan(*grouped(arrays), Options(delta_softplus, reverse), implementation)
    return (y, final_state) if return_final_state else y


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scan(sequences: Sequences, parameters: Parameters, options: Options, implementation: str) -> tuple[Array, Array]:
    return IMPLEMENTATIONS[implementation](sequences, parameters, options)


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
