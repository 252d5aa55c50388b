"""The page of predicted images."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from iumad_jax.report import predictions_page
from iumad_jax.report.predictions_page import Page


def row(number, relative_score):
    return {"image": f"<b>{number}", "relative_score": relative_score, "decision": "good", "object": "bolt"}


@pytest.fixture
def written(tmp_path):
    def write(page):
        summary = {"workdir": "</script>run", "step": 3, "count": 9, "damaged": [{"image": "x", "reason": "<i>broken"}]}
        page.write(tmp_path / "predictions.html", summary)
        return (tmp_path / "predictions.html").read_text()

    return write


def data(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_thumbnails_show_the_heatmaps(written):
    page, heatmap = Page(), np.zeros((600, 300, 3), np.uint8)
    heatmap[300:] = (250, 10, 120)
    page.add(row(0, 0.5), heatmap)
    (image,) = data(written(page))["images"]
    thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["thumbnail"]))).convert("RGB")).astype(int)
    assert thumbnail.shape == (240, 120, 3)
    assert thumbnail[:110].max() < 12
    assert np.abs(thumbnail[130:] - (250, 10, 120)).max() < 12


def test_the_page_keeps_the_highest_scores(written, monkeypatch):
    monkeypatch.setattr(predictions_page, "_MOST", 5)
    scores = np.random.default_rng(0).permutation(12) // 2 / 10  # with ties
    page = Page()
    for number, score in enumerate(scores):
        page.add(row(number, score), np.zeros((4, 4, 3), np.uint8))
    kept = sorted(image["relative_score"] for image in data(written(page))["images"])
    assert kept == sorted(scores)[-5:]


def test_the_page_needs_nothing_else_and_names_are_no_markup(written):
    page = Page()
    page.add(row(0, 0.5), np.zeros((4, 4, 3), np.uint8))
    html = written(page)
    assert not re.search(r"""(?:src|href)=["']?(?!data:)[a-z]""", html)
    assert "<b>" not in html
    assert "<i>" not in html
    assert data(html)["images"][0]["image"] == "<b>0"
    assert data(html)["workdir"] == "</script>run"
