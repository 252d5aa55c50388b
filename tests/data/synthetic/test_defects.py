"""Pasted defects: where they lie, in which modality, and how strong they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from iumad_jax.data.synthetic import paste
from iumad_jax.data.transforms import resize_nearest
from iumad_jax.shapes import MAP_SIZE

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZE = 64
DRAWS = 160


@functools.partial(jax.jit, static_argnums=(3, 4))
def pasted(seed, images, foreground, encoding="normals", confined=True):
    count = len(next(iter(images.values())))
    return paste(jax.random.split(jax.random.key(seed), count), images, foreground, encoding, confined)


@functools.partial(jax.jit, static_argnums=2)
def pasted_singly(seed, images, encoding):
    """Paste into batches of one image, which offer no other image as a texture."""
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    one = jax.vmap(lambda key, images: paste(key[None], jax.tree.map(lambda x: x[None], images), None, encoding))
    return jax.tree.map(lambda array: array[:, 0], one(keys, images))


def photographs(seed=0, count=DRAWS):
    return np.random.default_rng(seed).uniform(0, 255, (count, SIZE, SIZE, 3)).astype(np.float32)


def flat(value, count=DRAWS):
    return np.broadcast_to(np.array(value, np.float32), (count, SIZE, SIZE, 3))


def changed(images, result):
    return {m: (np.asarray(result.images[m]) != images[m]).any(-1) for m in images}


def at_map_size(masks):
    return np.stack([resize_nearest(mask, MAP_SIZE) for mask in masks])


def test_defects_lie_on_the_foreground_in_one_modality_or_both():
    images = {"rgb": photographs(0), "depth": flat((140, 100, 240))}
    foreground = np.zeros((DRAWS, MAP_SIZE, MAP_SIZE), bool)
    foreground[:, 20:160, 90:200] = True
    foreground[:20] = False  # images without an object stay good
    foreground[20:40] = np.eye(MAP_SIZE, dtype=bool)[:, ::-1] & (np.arange(MAP_SIZE) < 12)  # too small for a defect
    result = jax.tree.map(np.asarray, pasted(0, images, foreground))
    difference = {m: at_map_size(pixels) for m, pixels in changed(images, result).items()}
    assert not result.mask[:40].any()
    assert result.mask[40:].any((1, 2)).all()
    allowed = np.stack([resize_nearest(pixels, SIZE) for pixels in foreground])
    assert not (result.mask & ~at_map_size(allowed)).any()
    for modality, pixels in difference.items():
        assert not (pixels & ~result.mask).any()  # outside of the mask, images are bit-equal
        np.testing.assert_array_equal(pixels.any((1, 2)), result.shown[modality])
    inside = (difference["rgb"] == result.mask)[result.shown["rgb"]]
    assert inside.mean() > 0.9999  # textures change the whole mask
    rgb, depth = (result.shown[m][40:] for m in ("rgb", "depth"))
    assert (rgb | depth).all()
    counts = [(rgb & ~depth).sum(), (depth & ~rgb).sum(), (rgb & depth).sum()]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_texture_is_blended_with_a_uniform_weight():
    """The same defect on a black and on a grey image: I + w (A - I) differs by (1 - w) times the grey."""
    black, grey = flat((0, 0, 0)), flat((100, 100, 100))
    on_black, on_grey = (pasted_singly(1, {"rgb": image}, "normals") for image in (black, grey))
    np.testing.assert_array_equal(on_black.mask, on_grey.mask)
    mask = changed({"rgb": black}, on_black)["rgb"]
    assert mask.any((1, 2)).all()
    over, under = np.asarray(on_grey.images["rgb"]), np.asarray(on_black.images["rgb"])
    weights = [1 - (over[i][m] - under[i][m]) / 100 for i, m in enumerate(mask)]
    assert max(np.ptp(weight) for weight in weights) < 1e-4
    weight = np.array([np.mean(weight) for weight in weights])
    assert weight.min() > 0.2
    assert weight.max() <= 1 + 1e-6
    assert stats.kstest(weight, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    texture = [under[i][m] / weight[i] for i, m in enumerate(mask)]
    assert min(values.min() for values in texture) >= -1e-3
    assert max(values.max() for values in texture) <= 255 + 1e-3


def test_an_image_is_never_its_own_texture():
    """In a batch of images of one grey each, a texture that is another image has another grey."""
    images = {"rgb": np.stack([np.full((SIZE, SIZE, 3), grey, np.float32) for grey in np.linspace(0, 255, DRAWS)])}
    result = pasted(2, images, None)
    pixels = changed(images, result)["rgb"]
    np.testing.assert_array_equal(pixels.any((1, 2)), result.shown["rgb"])
    assert result.shown["rgb"].all()
    inside = [image[m] for image, m in zip(np.asarray(result.images["rgb"]), pixels, strict=True)]
    of_one_grey = sum(np.ptp(values) < 1e-3 for values in inside)
    assert stats.binomtest(of_one_grey, DRAWS, 1 / 5).pvalue > 1e-3  # the share of this family


def test_strength_of_reliefs():
    """Slopes from 5 to 45 degrees and heights from 1 to 10 % of the range, log-uniform; half are bumps."""
    upright, middle = {"depth": flat((127.5, 127.5, 255))}, {"depth": flat((127, 127, 127))}
    normals = np.asarray(pasted_singly(3, upright, "normals").images["depth"]) / 127.5 - 1
    lean = np.degrees(np.arccos(np.clip(normals[..., 2], -1, 1))).max((1, 2))
    assert lean.min() > 4.9
    assert lean.max() < 45.1
    assert stats.kstest(np.log(lean), stats.uniform(np.log(5), np.log(9)).cdf).pvalue > 0.001
    change = (np.asarray(pasted_singly(4, middle, "height").images["depth"])[..., 0] - 127) / 255
    height = np.abs(change).max((1, 2))
    assert stats.kstest(np.log(height), stats.uniform(np.log(0.01), np.log(10)).cdf).pvalue > 0.001
    up, down = (change > 0).any((1, 2)), (change < 0).any((1, 2))
    assert (up ^ down).all()
    assert stats.binomtest(int(up.sum()), DRAWS).pvalue > 0.001


def components(masks):
    return np.array([ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks])


def test_confined_defects_are_small_and_others_spread_over_the_image():
    images = {"rgb": photographs()}
    confined, spread = (np.asarray(pasted(5, images, None, "normals", confined).mask) for confined in (True, False))
    areas, spread_areas = confined.mean((1, 2)), spread.mean((1, 2))
    assert min(areas.min(), spread_areas.min()) > 0.0008  # 0.1 % of 64 x 64 pixels, enlarged
    low, middle, high = np.quantile(areas, [0.1, 0.5, 0.9])
    assert low < 0.004
    assert 0.005 < middle < 0.02
    assert 0.02 < high < 0.08
    assert abs(spread_areas.mean() - 0.0485 / 0.945) < 0.002 + 3 * spread_areas.std() / np.sqrt(DRAWS)  # none empty
    assert np.mean(components(confined) == 1) > 0.7
    assert np.median(components(spread)) > 3
    rows, columns = (confined.any(axis).sum(1) / MAP_SIZE for axis in (2, 1))
    assert max(rows.max(), columns.max()) < 2 * 0.15 * 1.6  # noise enlarges the radius of 15 % a little


def test_keys_decide_and_devices_do_not_matter():
    images = {"rgb": photographs(count=8)}
    first, again, other = (np.asarray(pasted(seed, images, None).mask) for seed in (6, 6, 7))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any((1, 2)).all()
    assert len({mask.tobytes() for mask in first}) == 8
    keys = jax.random.split(jax.random.key(6), 8)
    alone = jax.jit(lambda key, image: paste(key[None], {"rgb": image[None]}, None, "normals").mask[0])
    np.testing.assert_array_equal(alone(keys[3], jnp.asarray(images["rgb"][3])), first[3])
