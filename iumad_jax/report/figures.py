"""Draws pictures of a run: heatmaps with ground truth, and the matrix of a metric."""

import functools
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter

from iumad_jax.runtime.storage import write_whole

TRUTH = "#00ffff"  # outline of a defect
HOLE = "#ff00c8"  # missing depth
RELIEF = (-0.3, 1.15)  # values drawn black and white
_FONTS = (  # of which those that are installed draw the characters that the first one lacks
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei"),
    *("SimHei", "PingFang SC", "Hiragino Sans GB", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("Malgun Gothic", "Noto Sans CJK KR", "Arial Unicode MS", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans"),
)
rcParams["font.family"] = [name for name in _FONTS if name in set(font_manager.get_font_names())]
_HEAT = "inferno"
_DPI = 120
_STEEPNESS = 0.05  # weight of slopes in the relief, height scales per image width
_PANEL, _LABEL, _BAR, _HEAD, _RIM = 1.93, 1.15, 0.75, 0.62, 0.06  # inches
_GAP = 0.03  # between panels, in their sides


def choose(defects: Sequence[str], rows: int) -> list[int]:
    """Choose the samples to show: one of each kind in turn, good first, up to `rows`; then grouped by kind."""
    kinds = sorted(set(defects), key=lambda kind: (kind != "good", kind))
    counts = dict.fromkeys(kinds, 0)
    turns = []
    for index, kind in enumerate(defects):
        turns.append((counts[kind], kinds.index(kind), index))
        counts[kind] += 1
    return [index for _, _, index in sorted(sorted(turns)[:rows], key=lambda turn: turn[1:])]


def label(defect: str, id_: str) -> str:
    """Return the lines beside a picture, without a defect name repeated in the id."""
    return "\n".join((defect, id_.removeprefix(f"{defect}/")))


def save_heatmaps(
    path: Path,
    *,
    title: str,
    labels: Sequence[str],
    rgb: ArrayLike,
    heights: ArrayLike | None,
    height_scale: float,
    masks: ArrayLike,
    maps: ArrayLike,
    scores: ArrayLike,
) -> None:
    """Save a picture with a row per sample: RGB, relief of heights, outlined defects, map, and map over RGB.

    Args:
        path: A .jpg or .png in an existing folder; .jpg takes a third of the space.
        title: Title of the picture.
        labels: Lines beside each row, above the score, (n,).
        rgb: Photographs, (n, h, w, 3) uint8.
        heights: Metres above the background plane, (n, h, w), NaN where missing; or None.
        height_scale: Height drawn in middle grey, metres.
        masks: Above 0 for anomalous pixels, (n, h, w).
        maps: Anomaly maps, (n, m, m); all share one colour scale.
        scores: Image scores, (n,).

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    images, truth, heats, values = np.asarray(rgb), np.asarray(masks) > 0, np.asarray(maps), np.asarray(scores)
    names = ["RGB", "relief", "truth", "map", "map over RGB"]
    if heights is None:
        names.remove("relief")

    width, height = _LABEL + len(names) * _PANEL + _BAR, _HEAD + len(labels) * _PANEL + _RIM
    figure = Figure((width, height), dpi=_DPI)
    figure.suptitle(title, x=_RIM / width, y=1 - _RIM / height, ha="left", va="top", fontsize=12, fontweight="bold")
    left, bottom, right, top = _LABEL / width, _RIM / height, 1 - _BAR / width, 1 - _HEAD / height
    axes = figure.add_axes((left, bottom, right - left, top - bottom))  # of all panels, since axes are slow to draw
    axes.set_autoscale_on(False)
    columns, rows = (count + _GAP * (count - 1) for count in (len(names), len(labels)))
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="auto")
    axes.set_axis_off()
    low, high = heats.min(), heats.max()
    norm = Normalize(low, high if high > low else low + 1)
    for row, lines in enumerate(labels):
        y = row * (1 + _GAP)
        boxes = {name: (x, x + 1, y + 1, y) for name, x in zip(names, np.arange(len(names)) * (1 + _GAP), strict=True)}
        text = f"{lines}\nscore {values[row]:.4g}"
        axes.annotate(text, (0, y + 0.5), (-4, 0), textcoords="offset points", ha="right", va="center", fontsize=9)
        for name, box in boxes.items():
            if row == 0:
                place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 10}
                axes.annotate(name, (box[0] + 0.5, 0), (0, 4), **place)
            if name in ("RGB", "truth", "map over RGB"):
                axes.imshow(images[row], extent=box, aspect="auto")
        if heights is not None:
            shaded, (dark, bright) = relief(np.asarray(heights)[row], height_scale), RELIEF
            shades = colormaps["gray"].with_extremes(bad=HOLE)
            options: dict[str, Any] = {"vmin": dark, "vmax": bright, "interpolation": "nearest", "aspect": "auto"}
            axes.imshow(shaded, shades, extent=boxes["relief"], **options)
        heat = axes.imshow(heats[row], _HEAT, norm, extent=boxes["map"], aspect="auto")
        strength = np.clip(1.6 * norm(heats[row]), 0, 0.85)  # normal areas stay transparent
        axes.imshow(heats[row], _HEAT, norm, extent=boxes["map over RGB"], aspect="auto", alpha=strength)
        _outline(axes, truth[row], boxes["truth"])
    bar = figure.add_axes((1 - (_BAR - 0.1) / width, bottom, 0.13 / width, top - bottom))
    figure.colorbar(heat, cax=bar).ax.tick_params(labelsize=8)
    _save(path, figure)


def overlay(rgb: NDArray, heat: NDArray, threshold: float) -> NDArray:
    """Return the image, (h, w, 3) uint8, with the anomaly map, resized to it, drawn over it.

    Values below half of the threshold stay transparent; the region above the threshold is outlined.
    """
    height, width = rgb.shape[:2]
    full = np.asarray(Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    strength = np.clip(full / (threshold or 1) - 0.5, 0, 1)[..., None]
    colours = colormaps[_HEAT](Normalize(0, 2 * (threshold or 1))(full))[..., :3] * 255
    picture = rgb + 0.85 * strength * (colours - rgb)
    above = full > threshold
    picture[above & ~binary_erosion(above, iterations=max(1, width // 256))] = np.multiply(to_rgb(TRUTH), 255)
    return np.rint(picture).astype(np.uint8)


def save_matrix(path: Path, matrix: ArrayLike, objects: Sequence[str], steps: Sequence[str], title: str) -> None:
    """Save the matrix of one metric as coloured cells with their values.

    Args:
        path: A .png in an existing folder.
        matrix: Values from 0 to 1, (steps, objects); NaN, not learned or undefined, leaves a cell empty.
        objects: Names of the columns.
        steps: Names of the rows.
        title: Title of the picture.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    values = np.asarray(matrix, float)
    figure = Figure((2.2 + 0.62 * len(objects), 1.9 + 0.42 * len(steps)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    lowest = values.min(initial=0.5, where=~np.isnan(values))  # chance level, or a lower value
    cells = axes.imshow(values, "viridis", aspect="auto", vmin=lowest, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "black" if value - lowest > 0.6 * (1 - lowest) else "white"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(range(len(objects)), objects, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(steps)), steps)
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left")
    axes.spines[:].set_visible(False)
    figure.colorbar(cells)
    _save(path, figure)


def save_curves(path: Path, curves: Mapping[str, Mapping[str, ArrayLike]], title: str) -> None:
    """Save values over steps: one panel per metric, one line per method with a band over seeds.

    Args:
        path: A .png in an existing folder.
        curves: Metric -> method -> (seeds, steps).
        title: Title of the picture.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    figure = Figure((4.2 * len(curves) + 1.6, 3.6), dpi=_DPI, layout="constrained")
    for axes, (metric, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for number, (method, values) in enumerate(lines.items()):
            seeds = np.asarray(values, float)
            mean, deviation, steps = seeds.mean(0), seeds.std(0, ddof=len(seeds) > 1), range(seeds.shape[1])
            style = {"color": f"C{number % 10}", "marker": "osD^v"[number % 5], "markersize": 4}
            axes.plot(steps, mean, label=method, **style)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=metric, xlabel="after step", xticks=steps)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    _save(path, figure)


def relief(height: NDArray, scale: float) -> NDArray:
    """Shade heights (h, w) in metres: 0 on the plane, 0.5 at `scale`, always below 1; NaN where missing.

    Objects on the plane are lit from the upper left, which shows their shape.
    """
    height = height / scale
    bounded = height / (np.abs(height) + 1)  # high walls of a box must not hide the shape of the object
    smooth = gaussian_filter(np.nan_to_num(height), 1.5)  # hides the edges of enlarged pixels
    slope = (np.gradient(smooth, axis=0) + np.gradient(smooth, axis=1)) * height.shape[1]
    return bounded + np.where(bounded > 0.1, 0.25 * np.tanh(-_STEEPNESS * slope), 0)


def _outline(axes: Axes, mask: NDArray, box: tuple[float, float, float, float]) -> None:
    """Draw a line along the pixel edges around the mask in a box (left, right, bottom, top), and along its border."""
    if mask.any():
        left, right, bottom, top = box
        sharp = np.pad(mask, 1).repeat(4, axis=0).repeat(4, axis=1)
        y, x = (((np.arange(size) + 0.5) / 4 - 1) / (size / 4 - 2) for size in sharp.shape)
        x, y = left + x * (right - left), top + y * (bottom - top)
        halo = withStroke(linewidth=2.4, foreground="black")
        axes.contour(x, y, sharp, [0.5], colors=TRUTH, linewidths=1, path_effects=[halo])


def save(path: Path, figure: Figure, **options: Any) -> None:
    """Save a figure as PNG or JPEG, by the suffix of the path; options are those of Pillow.

    Characters that no installed font has are drawn as boxes, which is told once.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph .* missing from font")
        figure.savefig(picture, format=path.suffix[1:], pil_kwargs=options)
    if caught:
        _tell_missing_font()
    write_whole(path, picture.getvalue())


@functools.cache
def _tell_missing_font() -> None:
    print("iumad_jax: no installed font has all characters of the names; pictures show boxes.", file=sys.stderr)


def _save(path: Path, figure: Figure) -> None:
    # Chroma subsampling would blur thin outlines.
    options = {"quality": 75, "subsampling": 0} if path.suffix == ".jpg" else {}
    save(path, figure, optimize=True, **options)
