"""Comparison of runs: means and deviations, the paper's numbers, and pictures of every variant."""

import csv
import io
import json

import numpy as np
import pytest

from iumad_jax.report import comparison, published
from iumad_jax.report.comparison import Cell
from iumad_jax.report.tables import METRICS, summarise
from tests import sentences

OBJECTS = ["bagel", "rope", "tire"]


def save_run(workdir, folder, *matrices, dataset="candies", steps=(("bagel", "rope"), ("tire",)), ends=(np.nan,) * 2):
    """Save the results of a run; the matrices, used for every metric, are those of the method and of the baseline."""
    variants = [
        {
            "matrix": dict.fromkeys(METRICS, m),
            "summary": summarise(dict.fromkeys(METRICS, m)),
            "intervals": {metric: {"objects": [ends] * 3, "mean": ends} for metric in METRICS},
        }
        for m in matrices
    ]
    results = {
        "config": {"method": "iuf", "modality": "rgb", "dataset": {"name": dataset}},
        "protocol": "2-1",
        "objects": OBJECTS,
        "steps": [list(step) for step in steps],
        **variants[0],
        "baselines": dict(zip(("feature_norm",), variants[1:], strict=False)),
    }
    (workdir / "cells" / folder).mkdir(parents=True)
    text = json.dumps(results).replace("NaN", "null")
    (workdir / "cells" / folder / "results.json").write_text(text)


def forgetting(base, last):
    """Return a matrix of two objects learned first and a third; the metric of the first object changes."""
    return [[base, 0.8, np.nan], [last, 0.8, 0.6]]


@pytest.fixture
def workdir(tmp_path):
    save_run(tmp_path, "iuf_rgb_2-1_seed1", forgetting(1.0, 0.4))
    baseline = [[0.5, 0.5, np.nan], [0.5, 0.5, 0.5]]
    save_run(tmp_path, "iuf_rgb_2-1_seed0", forgetting(0.9, 0.7), baseline)
    save_run(tmp_path, "ib_iumad-no_mamba_rgb_2-1_seed0", forgetting(0.9, 0.9), baseline)
    save_run(tmp_path, "iuf_rgb_3-0_seed0", [[0.9, 0.8, 0.7]], steps=[OBJECTS])
    (tmp_path / "cells" / "iuf_rgb_2-1_seed2").mkdir()  # an unfinished run
    return tmp_path


def table(text, protocol):
    """Parse the table of a protocol: rows by modality and variant, cells by header."""
    lines = text.split(f"## {protocol}\n")[1].strip().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {tuple(row[:2]): dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_cells_are_found_by_their_folders(workdir):
    counts = {cell: len(runs) for cell, runs in comparison.gather(workdir).items()}
    assert counts == {
        Cell("2-1", "rgb", "iuf"): 2,
        Cell("2-1", "rgb", "feature_norm"): 1,
        Cell("2-1", "rgb", "ib_iumad-no_mamba"): 1,
        Cell("3-0", "rgb", "iuf"): 1,
    }


def test_means_and_deviations_over_seeds(workdir):
    """Final means 0.7 and 0.6; the first object drops by 0.2 and 0.6, the second not at all."""
    rows = table(comparison.write(workdir), "2-1")
    iuf = rows["rgb", "iuf"]
    assert iuf["seeds"] == "2"
    assert iuf["I-AUROC"] == "65.0 ± 7.1"  # 5 * sqrt(2)
    assert iuf["FM I-AUROC"] == "20.0 ± 14.1"  # mean of 10 and 30
    assert iuf["aggregate FM I-AUROC"] == "22.5 ± 10.6"  # base 85 and 90, then 70 and 60
    assert iuf["new AUPRO"] == "78.3 ± 2.4"  # 76.67 and 80
    assert rows["rgb", "ib_iumad-no_mamba"]["I-AUROC"] == "76.7"  # one seed has no deviation
    assert rows["rgb", "feature_norm"]["FM AUPRO"] == "0.0"


def test_intervals_over_test_images_are_averaged_over_seeds(tmp_path):
    save_run(tmp_path, "iuf_rgb_2-1_seed0", forgetting(0.9, 0.7), ends=(0.6, 0.8))
    save_run(tmp_path, "iuf_rgb_2-1_seed1", forgetting(1.0, 0.4), ends=(0.5, 0.74))
    save_run(tmp_path, "uniad_rgb_2-1_seed0", forgetting(1.0, 0.4))  # undefined
    rows = table(comparison.write(tmp_path), "2-1")
    assert rows["rgb", "iuf"]["object AUPRO"] == "65.0 ± 7.1 [55, 77]"
    assert rows["rgb", "iuf"]["FM I-AUROC"] == "20.0 ± 14.1"
    assert rows["rgb", "uniad"]["I-AUROC"] == "60.0"
    final, acc = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))[:2]
    assert (final["figure"], float(final["low"]), float(final["high"])) == ("final", 0.55, 0.77)
    assert (acc["figure"], acc["low"], acc["high"]) == ("acc", "", "")


def test_a_single_step_has_nothing_to_forget(workdir):
    row = table(comparison.write(workdir), "3-0")["rgb", "iuf"]
    assert row["object AUPRO"] == "80.0"
    assert not [title for title in row if "FM" in title or "new" in title]


def test_overview_in_the_form_of_the_paper(workdir):
    rows = table(comparison.write(workdir).replace("FM of I-AUROC:", "\n## all\n"), "all")
    assert list(rows["rgb", "iuf"])[2:] == ["3-0", "2-1"]
    assert rows["rgb", "iuf"]["3-0"] == "80.0 / 80.0 / -"
    assert rows["rgb", "iuf"]["2-1"] == "65.0 ± 7.1 / 65.0 ± 7.1 / 20.0 ± 14.1"
    assert rows["rgb", "feature_norm"]["3-0"] == sentences.NOT_MEASURED


def test_without_finished_runs_the_table_is_empty(tmp_path):
    text = comparison.write(tmp_path)
    assert "| rgb" not in text
    assert len((tmp_path / "comparison.csv").read_text().splitlines()) == 1
    comparison.draw(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_csv_has_every_figure(workdir):
    comparison.write(workdir)
    rows = list(csv.DictReader(io.StringIO((workdir / "comparison.csv").read_text())))
    assert len(rows) == 4 * len(METRICS) * 5
    chosen = [r for r in rows if (r["protocol"], r["variant"], r["metric"]) == ("2-1", "iuf", "p_auroc")]
    (fm,) = [row for row in chosen if row["figure"] == "fm"]
    assert float(fm["mean"]) == pytest.approx(0.2)
    assert float(fm["std"]) == pytest.approx(0.1 * 2**0.5)
    (undefined,) = [r for r in rows if (r["protocol"], r["metric"], r["figure"]) == ("3-0", "aupro", "fm")]
    assert undefined["mean"] == undefined["std"] == ""


def test_retention_follows_the_objects_of_the_base_step(workdir):
    runs = comparison.gather(workdir)[Cell("2-1", "rgb", "iuf")]
    np.testing.assert_allclose(comparison.retention(runs, "aupro"), [[0.85, 0.75], [0.9, 0.6]])


def test_pictures(workdir):
    comparison.draw(workdir)
    pictures = {path.name for path in workdir.glob("*.png")}
    assert pictures == {
        "forgetting_2-1_rgb.png",
        "matrix_2-1_rgb_iuf.png",
        "matrix_2-1_rgb_feature_norm.png",
        "matrix_2-1_rgb_ib_iumad-no_mamba.png",
        "matrix_3-0_rgb_iuf.png",
    }


def test_published_numbers_are_shown_for_the_real_dataset_only(workdir, tmp_path):
    save_run(tmp_path / "real", "ib_iumad_rgb+depth_6-1_seed0", forgetting(0.9, 0.7), dataset="eyecandies")
    row = table(comparison.write(tmp_path / "real"), "6-1")["rgb+depth", "ib_iumad"]
    printed = {title: value for title, value in row.items() if title.startswith("printed")}
    assert printed == {  # the paper's table of Eyecandies
        "printed I-AUROC": "69.4",
        "printed AUPRO": "75.1",
        "printed FM I-AUROC": "7.7",
        "printed FM AUPRO": "6.3",
    }
    assert "printed" not in comparison.write(workdir)
    assert set(published.printed("mvtec3d", "6-1", "rgb", "uniad").values()) == {"-"}
