"""Further images of a learned object: methods cover its earlier images and these, and other objects stay."""

import importlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from iumad_jax.methods.gaussian import gaussian
from iumad_jax.methods.memory_bank import memory_bank
from iumad_jax.shapes import BY_OBJECT, Batch
from tests.methods.reference import map_from

TOKENS, CHANNELS = 16, 3
MODULE = importlib.import_module("iumad_jax.methods.memory_bank")  # the package has a function of this name


def build(megabytes=1.0):
    return memory_bank(ConfigDict({"megabytes": megabytes, "neighbourhood": 1, "place": 0.0}))


def images(seed, count, object_id=0, mean=0.0):
    """Return features that float16 holds exactly, so that a bank holds them up to the rounding of z-scores."""
    x = np.random.default_rng(seed).normal(mean, 2, (count, TOKENS, CHANNELS))
    return Batch({"rgb": x.astype(np.float16).astype(np.float32)}, {}, np.full(count, object_id, np.int32))


def learned(method, *batches):
    variables = method.init(jax.random.key(0), batches[0])
    for step, batch in enumerate(batches):
        variables = method.observe(variables, batch, step)
    return variables


def nearest(rows, patches):
    """Compute the distance of each row to the nearest patch, in float64."""
    return np.linalg.norm(rows[..., None, :].astype(np.float64) - patches.astype(np.float64), axis=-1).min(-1)


@pytest.mark.parametrize("build_method", [build, gaussian])
def test_other_objects_are_the_same_arrays(build_method):
    method = build_method()
    before = learned(method, images(0, 4), images(1, 5, 1), images(2, 6, 2))
    after = method.observe(before, images(3, 3, 1), 3)
    assert [new is old for new, old in zip(after[BY_OBJECT], before[BY_OBJECT], strict=True)] == [True, False, True]


def test_gaussian_of_further_images_is_that_of_all():
    method, first, further = gaussian(), images(0, 4), images(1, 5, mean=3)
    merged = learned(method, first, further)[BY_OBJECT]
    whole = learned(method, jax.tree.map(lambda *arrays: np.concatenate(arrays), first, further))[BY_OBJECT]
    precisions = [item["rgb"]["whitening"] @ item["rgb"]["whitening"].T for (item,) in (merged, whole)]
    np.testing.assert_allclose(*precisions, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged[0]["rgb"]["mean"], whole[0]["rgb"]["mean"], rtol=1e-5)


def test_a_bank_with_room_holds_the_patches_of_all_images():
    """They are standardised by the moments of the earlier images; both the earlier and the further images are good."""
    method, first, further, test = build(), images(0, 4), images(1, 5, mean=6), images(2, 3, mean=3)
    before, after = learned(method, first), learned(method, first, further)
    x = first.features["rgb"].reshape(-1, CHANNELS).astype(np.float64)
    patches, further_patches, z = (
        (batch.features["rgb"].astype(np.float64) - x.mean(0)) / x.std(0) for batch in (first, further, test)
    )
    both = np.concatenate([patches, further_patches]).reshape(-1, CHANNELS)
    predicted = jax.jit(method.predict)(method.arrange(after), test).maps["rgb"]
    np.testing.assert_allclose(predicted, map_from(nearest(z, both).astype(np.float32)), rtol=5e-3)
    jax.tree.map(np.testing.assert_array_equal, *(v[BY_OBJECT][0]["rgb"]["moments"] for v in (before, after)))
    for batch in (first, further):
        assert float(jax.jit(method.predict)(method.arrange(after), batch).maps["rgb"].max()) < 0.05


def test_a_full_bank_covers_all_images_within_its_bytes():
    """Its patches are among those of the earlier bank and of the new images, and leave no region out."""
    size = 24
    method = build(megabytes=size * (CHANNELS + 2) * 2 / 2**20)
    first, further = images(0, 40), images(1, 40, mean=20)
    before, after = (learned(method, *batches)[BY_OBJECT][0]["rgb"] for batches in ([first], [first, further]))
    assert len(after["patches"]) == len(before["patches"]) == size
    old = {tuple(row) for row in before["patches"]} & {tuple(row) for row in after["patches"]}
    assert 0 < len(old) < size
    x = first.features["rgb"].reshape(-1, CHANNELS)
    rows = np.concatenate([first.features["rgb"], further.features["rgb"]]).reshape(-1, CHANNELS)
    chosen = after["patches"][:, :CHANNELS]
    distance = nearest((rows - x.mean(0)) / x.std(0), chosen)
    apart = nearest(chosen, chosen[:1])
    assert distance.max() < 0.4 * apart.max()


@pytest.mark.parametrize("count", [1, 5])
def test_held_out_errors_of_new_images_come_before_those_of_earlier_ones(count):
    """New images are held out against the earlier bank and each other; errors of the earlier images are kept."""
    method, first, further = build(), images(0, 4), images(1, count)
    before, after = (learned(method, *batches)[BY_OBJECT][0]["rgb"] for batches in ([first], [first, further]))
    x = first.features["rgb"].reshape(-1, CHANNELS).astype(np.float64)
    old, new = ((batch.features["rgb"] - x.mean(0)) / x.std(0) for batch in (first, further))
    expected = [nearest(new[i], np.concatenate([*old, *np.delete(new, i, 0)])) for i in range(count)]
    np.testing.assert_allclose(after["held_out"][:count], expected, rtol=5e-3, atol=5e-3)
    np.testing.assert_array_equal(after["held_out"][count:], before["held_out"])


def test_earlier_held_out_errors_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(MODULE, "_HELD_OUT", 8)
    method, first = build(), images(0, 8)
    before = learned(method, first)[BY_OBJECT][0]["rgb"]["held_out"]
    after = learned(method, first, images(1, 5))[BY_OBJECT][0]["rgb"]["held_out"]
    assert len(before) == len(after) == 8
    np.testing.assert_array_equal(after[5:], before[[0, 3, 7]])
    many = learned(method, first, images(1, 20))[BY_OBJECT][0]["rgb"]["held_out"]
    assert len(many) == 8
    assert not (many[:, None] == before[None]).all(-1).any()


def test_the_earlier_bank_stays_a_candidate_if_there_are_too_many_patches(monkeypatch):
    """The memory of the choice is bounded at the cost of new patches, as the earlier ones are already a choice."""
    method, first, further = build(), images(0, 4), images(1, 40, mean=6)
    bytes_of = 4 * (CHANNELS + 2)
    monkeypatch.setattr(MODULE, "_CANDIDATES", 100 * bytes_of)
    before, after = (learned(method, *batches)[BY_OBJECT][0]["rgb"] for batches in ([first], [first, further]))
    assert (len(before["patches"]), len(after["patches"])) == (64, 100)
    assert {tuple(row) for row in before["patches"]} <= {tuple(row) for row in after["patches"]}
