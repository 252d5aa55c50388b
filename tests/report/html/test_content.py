"""The data in the page of a run."""

import json
import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from iumad_jax.errors import UserError
from iumad_jax.metrics import pro_curve
from iumad_jax.report import html, samples
from tests import sentences


def embedded(path):
    """Return the data of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def test_best_median_and_worst_images_of_every_kind_are_picked():
    scores = np.array([0.3, 0.1, 0.2, 0.9, 0.5, 0.7, 0.6])
    summary = samples.summarise(
        list("abcdefg"), ["good"] * 3 + ["bump"] * 2 + ["dent", "good"], [0, 0, 0, 1, 1, 1, 0], None, {"ours": scores},
        {"ours": np.zeros((7, 8, 8))}, [0] * 7, [1] * 7,
    )  # fmt: skip
    assert html.pick(summary) == [
        (1, "best", 1, 4),  # good: 0.1 < 0.2 < 0.3 < 0.6
        (0, "median", 3, 4),
        (6, "worst", 4, 4),
        (3, "best", 1, 2),  # bump: 0.9 > 0.5
        (4, "worst", 2, 2),
        (5, "worst", 1, 1),  # the only dent
    ]


def test_the_outline_encloses_the_mask():
    mask = np.zeros((20, 30), bool)
    mask[2:9, 4:15] = True
    mask[4:6, 6:10] = False  # a hole
    mask[15:, 25:] = True  # at the border
    area = 0
    for line in samples.outline(mask).split("M")[1:]:
        x, y = np.array([point.split() for point in line.rstrip("Z").split("L")], float).T
        area += (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        assert x.min() >= 4
        assert x.max() <= 30
    corners = (
        3 * 4 * 0.125
    )  # corners are cut, in the hole filled; the outlines of outside and hole have opposite directions
    assert abs(area) == pytest.approx(mask.sum(), abs=corners)
    assert samples.outline(np.zeros((4, 4))) == ""


def test_pictures_beyond_the_budget_are_left_out_median_first(workdir, tmp_path, monkeypatch, zoo):
    all_samples = embedded(workdir / "report.html")["samples"]
    size = len(json.dumps(all_samples)) / len(all_samples)
    monkeypatch.setattr(html, "BUDGET", int(12.5 * size))
    zoo.write(tmp_path)
    data = embedded(tmp_path / "report.html")
    picks = [sample["pick"] for sample in data["samples"]]
    assert picks.count("worst") == 9  # three objects, three kinds
    assert 1 <= picks.count("best") <= 4
    assert "median" not in picks
    assert data["left_out"] == len(all_samples) - len(picks)


def test_missing_samples_are_reported(workdir, tmp_path, zoo):
    with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("step1_cat.npz"))):
        html.write(tmp_path, zoo.run())


def test_curves_are_those_of_sklearn(workdir, zoo):
    curves = embedded(workdir / "report.html")["curves"]
    for name in zoo.OBJECTS:
        scores, maps = zoo.predictions(name, 1)
        for method in zoo.VARIANTS:
            x, y = curves[name][method]["roc"]
            labels = [kind != "good" for kind in zoo.KINDS]
            assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(labels, scores[method]), abs=1e-4)
            overlap, _ = pro_curve(zoo.truth(name)[2], maps[method], samples.RATES)
            np.testing.assert_allclose(curves[name][method]["overlap"], overlap, atol=1e-5)
