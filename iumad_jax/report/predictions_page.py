"""Writes predictions.html: predicted images with their heatmaps, in one file that opens offline.

The page is page/predictions.html with style and scripts inlined, like that of `html`.
"""

import base64
import heapq
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iumad_jax.report import html
from iumad_jax.runtime import storage

SIDE = 240  # pixels of the longer side of a thumbnail
_MOST = 1000  # images per page, about 10 MB


class Page:
    """Page under construction. It keeps the images of the highest relative scores."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._shown: list[tuple[float, int, dict[str, Any], bytes]] = []

    def add(self, row: dict[str, Any], heatmap: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add an image, given its row of predictions.csv and its heatmap, if its score is high enough."""
        image, thumbnail = Image.fromarray(heatmap), io.BytesIO()
        image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        image.save(thumbnail, "JPEG", quality=80)
        heapq.heappush(self._shown, (row["relative_score"], -next(self._numbers), row, thumbnail.getvalue()))
        if len(self._shown) > _MOST:
            heapq.heappop(self._shown)

    def write(self, path: Path, summary: dict[str, Any]) -> None:
        """Write the page.

        Args:
            path: File to write.
            summary: `workdir` and `step` of the model, `count` of all images, and `damaged`, the name and reason of
                each image that could not be used.

        Raises:
            UserError: If the page cannot be written.
        """
        images = [row | {"thumbnail": base64.b64encode(jpeg).decode()} for *_, row, jpeg in self._shown]
        page = summary | {"images": images}
        content = html.fill("predictions.html", ("chart.js", "predictions.js"), page, f"Predictions of {path.parent}")
        storage.write_whole(path, content.encode())
