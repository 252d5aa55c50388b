"""New objects change nothing of what a method says about the old ones before it is trained further."""

import jax
import numpy as np
import pytest

from iumad_jax import methods
from iumad_jax.config import small
from iumad_jax.shapes import BY_OBJECT, Batch
from tests.methods.reference import grown_variables

pytestmark = pytest.mark.slow

CHANNELS, TOKENS, SIZE = 6, 64, 16


def images(object_id, count=4):
    rng = np.random.default_rng(object_id)
    return Batch(
        {"rgb": rng.normal(0, 2, (count, TOKENS, CHANNELS)).astype(np.float32)},
        {"rgb": rng.uniform(0, 255, (count, SIZE, SIZE, 3)).astype(np.float32)},
        np.full(count, object_id, np.int32),
    )


@pytest.mark.parametrize("name", ["ib_iumad", "iuf", "uniad"])
def test_error_maps_of_old_objects_stay(name):
    """They are equal bit for bit, and so is the compiled prediction, unless a new block begins."""
    config = small("1-1")
    config.modality = "rgb"
    config.model.update(width=8, heads=2, layers=1, hidden=12, class_grid=8, states=2, patch_size=4)
    method, key = methods.build(name, config), jax.random.key(1)
    variables, predict, maps = grown_variables(method, images(0), 0) | {BY_OBJECT: ()}, jax.jit(method.predict), {}
    for objects in range(1, 10):
        variables = method.grow(variables, objects, key)
        variables = method.observe(variables, images(objects - 1), objects - 1)
        variables = method.fit(variables, images(objects - 1), objects - 1, False)
        old = [images(object_id, count=2) for object_id in range(min(objects, 8))]
        predictions = [predict(method.arrange(variables), batch) for batch in old]
        maps[objects] = np.stack([prediction.maps["rgb"] for prediction in predictions])
        if objects == 8:
            assert predict._cache_size() == 1
    for before in range(1, 8):
        np.testing.assert_array_equal(maps[before + 1][:before], maps[before])
    np.testing.assert_allclose(maps[9], maps[8], rtol=1e-6, atol=1e-6)
    assert maps[8].std((1, 2, 3)).min() > 0.01
