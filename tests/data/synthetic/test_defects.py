"""Pasted defects: where they lie, in which modality, and how strong they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from iumad_jax.data.synthetic import paste
from iumad_jax.data.transforms import resize_nearest
from iumad_jax.shapes import MAP_SIZE

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZE = 48
DRAWS = 160


KEYS = jax.random.split(jax.random.key(0), DRAWS)
STEP = 100  # difference between two series of grey images
SHIFT = 7
EMPTY, SMALL, BOX, EVERYWHERE = slice(20), slice(20, 40), slice(40, 80), slice(80, None)  # kinds of foreground


def flat(value):
    return np.broadcast_to(np.array(value, np.float32), (DRAWS, SIZE, SIZE, 3))


@pytest.fixture(scope="module")
def foreground():
    pixels = np.ones((DRAWS, MAP_SIZE, MAP_SIZE), bool)
    pixels[:80] = False
    pixels[SMALL] = np.eye(MAP_SIZE, dtype=bool)[:, ::-1] & (np.arange(MAP_SIZE) < 12)  # too small for a defect
    pixels[BOX, 20:160, 90:200] = True
    return pixels


@pytest.fixture(scope="module")
def images():
    """Return images of another grey each, whose depth is an upright plane."""
    greys = np.linspace(0, 255 - STEP, DRAWS, dtype=np.float32)
    return {"rgb": flat(0) + greys[:, None, None, None], "depth": flat((127, 127.5, 127.5))}


@pytest.fixture(scope="module")
def pasted(compile_quickly, images, foreground):
    """Return defects in the images, and the same ones where all images are brighter and elsewhere in the batch."""
    run = jax.jit(lambda *arguments: paste(*arguments, "height+normals"))
    moved = jax.tree.map(lambda x: np.roll(x, SHIFT, axis=0), (images | {"rgb": images["rgb"] + STEP}, foreground))
    result = run(KEYS, images, foreground), run(jnp.roll(KEYS, SHIFT), *moved)
    dark, bright = jax.tree.map(np.asarray, result)
    return dark, jax.tree.map(lambda x: np.roll(x, -SHIFT, axis=0), bright)


def changed(images, result):
    return {m: (np.asarray(result.images[m]) != images[m]).any(-1) for m in result.images}


def at_map_size(masks):
    return np.stack([resize_nearest(mask, MAP_SIZE) for mask in masks])


def test_defects_lie_on_the_foreground_in_one_modality_or_both(images, foreground, pasted):
    result, _ = pasted
    drawn = result.mask.any((1, 2))
    assert not drawn[EMPTY].any()  # images without an object stay good
    assert not drawn[SMALL].any()
    assert drawn[BOX].all()
    assert drawn[EVERYWHERE].all()
    allowed = np.stack([resize_nearest(pixels, SIZE) for pixels in foreground])
    assert not (result.mask & ~at_map_size(allowed)).any()
    pixels = {m: at_map_size(difference) for m, difference in changed(images, result).items()}
    for modality, difference in pixels.items():
        assert not (difference & ~result.mask).any()  # outside of the mask, images are bit-equal
        np.testing.assert_array_equal(difference.any((1, 2)), result.shown[modality])
    inside = (pixels["rgb"] == result.mask)[result.shown["rgb"]]
    assert inside.mean() > 0.9999  # textures change the whole mask
    rgb, depth = (result.shown[m][drawn] for m in ("rgb", "depth"))
    assert (rgb | depth).all()
    counts = [(rgb & ~depth).sum(), (depth & ~rgb).sum(), (rgb & depth).sum()]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_texture_is_blended_with_a_uniform_weight_and_never_the_image_itself(images, pasted):
    """I + w (A - I) differs by (1 - w) STEP between the series, but by STEP if A is another image."""
    dark, bright = pasted
    shown = np.flatnonzero(dark.shown["rgb"])
    pixels = changed(images, dark)["rgb"]
    inside = [[x.images["rgb"][i][pixels[i]] for x in (dark, bright)] for i in shown]
    of_one_grey = np.array([np.ptp(values) < 1e-3 for values, _ in inside])
    assert stats.binomtest(int(of_one_grey.sum()), len(shown), 1 / 5).pvalue > 1e-3  # the share of this family
    weights = np.array([1 - (np.mean(b - a) / STEP) for a, b in inside])
    assert np.abs(weights[of_one_grey]).max() < 1e-4
    patterns = [(i, w, *x) for i, w, x, same in zip(shown, weights, inside, of_one_grey, strict=True) if not same]
    assert max(np.ptp(b - a) for _, _, a, b in patterns) < 1e-2
    weights = weights[~of_one_grey]
    assert weights.min() > 0.2
    assert weights.max() <= 1 + 1e-6
    assert stats.kstest(weights, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    textures = [(a - (1 - w) * images["rgb"][i, 0, 0]) / w for i, w, a, _ in patterns]
    assert min(values.min() for values in textures) >= -1e-2
    assert max(values.max() for values in textures) <= 255 + 1e-2


def test_strength_of_reliefs(pasted):
    """Slopes from 5 to 45 degrees and heights from 1 to 10 % of the range, log-uniform; half are bumps."""
    result, _ = pasted
    depth = result.images["depth"][result.shown["depth"]]
    lean = np.degrees(np.arcsin(np.hypot(*np.moveaxis(depth[..., 1:] / 127.5 - 1, -1, 0)).max((1, 2))))
    assert lean.min() > 4.9
    assert lean.max() < 45.1
    assert stats.kstest(np.log(lean), stats.uniform(np.log(5), np.log(9)).cdf).pvalue > 0.001
    change = (depth[..., 0] - 127) / 255
    height = np.abs(change).max((1, 2))
    assert stats.kstest(np.log(height), stats.uniform(np.log(0.01), np.log(10)).cdf).pvalue > 0.001
    assert abs(stats.spearmanr(lean, height).statistic) < 3.3 / np.sqrt(len(depth))  # independent
    up, down = (change > 0).any((1, 2)), (change < 0).any((1, 2))
    assert (up ^ down).all()
    assert stats.binomtest(int(up.sum()), len(depth)).pvalue > 0.001


def components(masks):
    return np.array([ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks])


def test_confined_defects_are_small_and_others_spread_over_the_image(images, pasted):
    """The others are drawn in batches of one image without depth, which offer no other image as a texture."""
    one = jax.vmap(lambda key, rgb: paste(key[None], {"rgb": rgb[None]}, None, "normals", confined=False))
    images = {"rgb": images["rgb"][EVERYWHERE]}
    result = jax.tree.map(lambda x: np.asarray(x[:, 0]), jax.jit(one)(KEYS[EVERYWHERE], images["rgb"]))
    difference = changed(images, result)["rgb"]
    assert result.shown["rgb"].all()
    assert min(np.ptp(image[m]) for image, m in zip(result.images["rgb"], difference, strict=True)) > 1e-3
    confined, spread = pasted[0].mask[EVERYWHERE], result.mask
    np.testing.assert_array_equal(at_map_size(difference), spread)
    areas, spread_areas = confined.mean((1, 2)), spread.mean((1, 2))
    assert min(areas.min(), spread_areas.min()) > 0.0008  # 0.1 % of 48 x 48 pixels, enlarged
    low, middle, high = np.quantile(areas, [0.1, 0.5, 0.9])
    assert low < 0.004
    assert 0.005 < middle < 0.02
    assert 0.02 < high < 0.08
    assert abs(spread_areas.mean() - 0.0485 / 0.945) < 0.002 + 3 * spread_areas.std() / np.sqrt(
        len(spread)
    )  # none empty
    assert np.mean(components(confined) == 1) > 0.7
    assert np.median(components(spread)) > 3
    rows, columns = (confined.any(axis).sum(1) / MAP_SIZE for axis in (2, 1))
    assert max(rows.max(), columns.max()) < 2 * 0.15 * 1.6  # noise enlarges the radius of 15 % a little


def test_keys_decide_and_the_rest_of_the_batch_does_not_matter(pasted):
    dark, bright = pasted
    np.testing.assert_array_equal(dark.mask, bright.mask)
    np.testing.assert_array_equal(dark.images["depth"], bright.images["depth"])
    assert len({mask.tobytes() for mask in dark.mask[EVERYWHERE]}) == len(dark.mask[EVERYWHERE])
