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
SIZE = 64
DRAWS = 160


KEYS = jax.random.split(jax.random.key(0), DRAWS)
STEP = 100  # difference between two series of grey images


@jax.jit
def pasted(keys, images, foreground):
    return paste(keys, images, foreground, "height+normals")


def flat(value):
    return np.broadcast_to(np.array(value, np.float32), (DRAWS, SIZE, SIZE, 3))


def changed(images, result):
    return {m: (result.images[m] != images[m]).any(-1) for m in images}


def at_map_size(masks):
    return np.stack([resize_nearest(mask, MAP_SIZE) for mask in masks])


def test_defects_lie_on_the_foreground_in_one_modality_or_both():
    photographs = np.random.default_rng(0).uniform(0, 255, (DRAWS, SIZE, SIZE, 3)).astype(np.float32)
    images = {"rgb": photographs, "depth": flat((100, 140, 100))}
    foreground = np.zeros((DRAWS, MAP_SIZE, MAP_SIZE), bool)
    foreground[:, 20:160, 90:200] = True
    foreground[:20] = False  # images without an object stay good
    foreground[20:40] = np.eye(MAP_SIZE, dtype=bool)[:, ::-1] & (np.arange(MAP_SIZE) < 12)  # too small for a defect
    result = jax.tree.map(np.asarray, pasted(KEYS, images, foreground))
    assert not result.mask[:40].any()
    assert result.mask[40:].any((1, 2)).all()
    allowed = np.stack([resize_nearest(pixels, SIZE) for pixels in foreground])
    assert not (result.mask & ~at_map_size(allowed)).any()
    pixels = {m: at_map_size(difference) for m, difference in changed(images, result).items()}
    for modality, difference in pixels.items():
        assert not (difference & ~result.mask).any()  # outside of the mask, images are bit-equal
        np.testing.assert_array_equal(difference.any((1, 2)), result.shown[modality])
    inside = (pixels["rgb"] == result.mask)[result.shown["rgb"]]
    assert inside.mean() > 0.9999  # textures change the whole mask
    rgb, depth = (result.shown[m][40:] for m in ("rgb", "depth"))
    assert (rgb | depth).all()
    counts = [(rgb & ~depth).sum(), (depth & ~rgb).sum(), (rgb & depth).sum()]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.fixture(scope="module")
def on_grey(compile_quickly):
    """Return defects in images of another grey each, and the same defects where all images are brighter by STEP."""
    greys = flat(0) + np.linspace(0, 255 - STEP, DRAWS, dtype=np.float32)[:, None, None, None]
    everywhere = np.ones((DRAWS, MAP_SIZE, MAP_SIZE), bool)
    series = [{"rgb": rgb, "depth": flat((127, 127.5, 127.5))} for rgb in (greys, greys + STEP)]
    return [(images, jax.tree.map(np.asarray, pasted(KEYS, images, everywhere))) for images in series]


def test_a_texture_is_blended_with_a_uniform_weight_and_never_the_image_itself(on_grey):
    """I + w (A - I) differs by (1 - w) STEP between the series, but by STEP if A is another image."""
    (images, dark), (_, bright) = on_grey
    np.testing.assert_array_equal(dark.mask, bright.mask)
    shown = np.flatnonzero(dark.shown["rgb"])
    pixels = changed(images, dark)["rgb"]
    assert pixels[shown].any((1, 2)).all()
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


def test_strength_of_reliefs(on_grey):
    """Slopes from 5 to 45 degrees and heights from 1 to 10 % of the range, log-uniform; half are bumps."""
    _, result = on_grey[0]
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


def test_confined_defects_are_small_and_others_spread_over_the_image(on_grey):
    confined = on_grey[0][1].mask
    images = {"depth": flat((127.5, 127.5, 255))}
    result = jax.jit(lambda images: paste(KEYS, images, None, "normals", confined=False))(images)
    spread = np.asarray(result.mask)
    np.testing.assert_array_equal(at_map_size(changed(images, result)["depth"]).any((1, 2)), result.shown["depth"])
    assert result.shown["depth"].all()  # the only modality
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


def test_keys_decide_and_the_rest_of_the_batch_does_not_matter(on_grey):
    images, result = on_grey[0]
    assert len({mask.tobytes() for mask in result.mask}) == DRAWS
    alone = jax.jit(lambda key, image: paste(key[None], {"rgb": image[None]}, None, "normals"))
    i = np.flatnonzero(~result.shown["rgb"])[0]
    again = alone(KEYS[i], images["rgb"][i])
    np.testing.assert_array_equal(again.mask[0], result.mask[i])
    assert again.shown["rgb"].all()  # the only modality
    assert (again.images["rgb"][0] != images["rgb"][i]).any()
