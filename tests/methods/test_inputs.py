"""What a method tells of the inputs of its layers, against the outputs that the layers of its network have."""

import importlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import FrozenConfigDict

from iumad_jax.config import paper
from iumad_jax.shapes import Batch
from tests.methods.reference import grown_variables

pytestmark = pytest.mark.slow

GRID, CHANNELS, BOTH = 8, 6, ("rgb", "depth")
NOT_DENSE = {"conv", "stem"}  # names of other layers with kernels


@pytest.mark.parametrize("name", ["ib_iumad", "iuf", "uniad"])
def test_rows_times_kernel_plus_bias_are_the_outputs_of_every_dense_layer(name):
    module = importlib.import_module(f"iumad_jax.methods.{name}")  # the package names the function of this name
    config = paper("10-0").model
    config.update(width=8, heads=2, layers=1, hidden=12, patch_size=4, states=2, class_grid=8, target="both")
    method = getattr(module, name)(config, BOTH)
    rng = np.random.default_rng(0)
    batch = Batch(
        {m: rng.normal(0, 2, (2, GRID**2, CHANNELS)).astype(np.float32) for m in BOTH},
        {m: rng.integers(0, 256, (2, 16, 16, 3)).astype(np.float32) for m in BOTH},
        np.arange(2, dtype=np.int32),
    )
    variables = grown_variables(method, batch, 3)
    inputs = flatten_dict(jax.jit(method.inputs)(variables, batch))
    network = module.Network(FrozenConfigDict(config), BOTH)
    params = flatten_dict(variables["params"])
    for image in range(2):
        features, images = jax.tree.map(lambda a, i=image: a[i], (batch.features, batch.images))
        _, state = network.apply(
            {key: variables[key] for key in ("params", "statistics")}, features, images, deterministic=True,
            capture_intermediates=True, mutable=["intermediates"],
        )  # fmt: skip
        outputs = flatten_dict(state["intermediates"])
        for (*layer, _), rows in inputs.items():
            kernel, bias = params[*layer, "kernel"], params[*layer, "bias"]
            computed = rows[image] @ kernel.reshape(rows.shape[-1], -1) + bias.reshape(1, -1)
            output = np.reshape(outputs[*layer, "__call__"][-1], computed.shape)
            learned = output > -1e8  # the logits of objects that are not learned yet are fixed
            np.testing.assert_allclose(computed[learned], output[learned], rtol=1e-4, atol=1e-4, err_msg=layer)
    kernels = {path[:-1] for path in params if path[-1] == "kernel"}
    others = kernels - {path[:-1] for path in inputs}
    assert all(path[-1] in NOT_DENSE for path in others), others
