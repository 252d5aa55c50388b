"""Finished runs side by side: tables in the form of the paper's, and how each variant forgets.

Every run is a cell, whose folder is named after its variant, modality, protocol and seed.
"""

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from iumad_jax.report import figures, published
from iumad_jax.report.tables import METRICS, SUMMARY, read_results
from iumad_jax.runtime.storage import write_whole

_COLUMNS = {  # of a protocol's table: (figure, metric)
    **{METRICS[metric]: ("final", metric) for metric in ("i_auroc", "aupro", "p_auroc_object", "aupro_object")},
    **{f"FM {METRICS[metric]}": ("fm", metric) for metric in ("i_auroc", "aupro", "p_auroc_object")},
    **{f"aggregate FM {METRICS[metric]}": ("fm_aggregate", metric) for metric in ("i_auroc", "aupro")},
    **{f"new {METRICS[metric]}": ("new", metric) for metric in ("i_auroc", "aupro")},
}
_OVERVIEW = [METRICS["i_auroc"], METRICS["aupro"], f"FM {METRICS['i_auroc']}"]
_CURVES = ("i_auroc", "aupro", "p_auroc_object")
_LEGEND = (
    "Means over objects in percent, then over seeds, ± their standard deviation (n - 1). Without a prefix: after the\n"
    "last step. FM: how far objects fell from their best earlier value, by Chaudhry et al.; aggregate FM: how far the\n"
    "mean over objects seen fell from the base step's. new: at the step that learned the object. Baselines, not\n"
    "trained: `feature_norm` and `nearest_neighbours`. `joint` trains again on all objects seen, so it is not\n"
    "incremental."
)


class Cell(NamedTuple):
    """What has one run per seed."""

    protocol: str
    modality: str
    variant: str


Runs = dict[Cell, list[dict[str, Any]]]  # what results.json holds of a variant, seed by seed


def name(variant: str, modality: str, protocol: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{variant}_{modality}_{protocol}_seed{seed}"


def gather(workdir: Path) -> Runs:
    """The finished runs in `workdir/cells`, with the baselines that ran in them."""
    runs: dict[Cell, dict[str, Any]] = defaultdict(dict)  # by seed: baselines may have run beside several variants
    for folder in sorted((workdir / "cells").glob("*")):
        results = read_results(folder)
        if results is not None:
            variant, modality, protocol, seed = folder.name.rsplit("_", 3)
            shared = {key: results[key] for key in ("config", "objects", "steps")}
            for found, own in {variant: results, **results["baselines"]}.items():
                runs[Cell(protocol, modality, found)][seed] = {**own, **shared}
    return {cell: list(by_seed.values()) for cell, by_seed in sorted(runs.items())}


def write(workdir: Path) -> str:
    """Writes comparison.md and comparison.csv of all finished runs; returns what comparison.md holds.

    Raises:
        UserError: the disk is full or the workdir not writable.
    """
    runs = gather(workdir)
    text = markdown(runs)
    write_whole(workdir / "comparison.md", text.encode())
    write_whole(workdir / "comparison.csv", as_csv(runs).encode())
    return text


def draw(workdir: Path) -> None:
    """Draws every variant's matrix, and per protocol and modality how all of them forget."""
    runs = gather(workdir)
    for protocol, modality in {(cell.protocol, cell.modality) for cell in runs}:
        variants = {cell.variant: found for cell, found in runs.items() if cell[:2] == (protocol, modality)}
        stem = f"{protocol}_{modality}"
        for variant, found in variants.items():
            matrix = np.mean([_matrix(run, "i_auroc") for run in found], axis=0)
            rows = [f"step {index}" for index in range(len(matrix))]
            path = workdir / f"matrix_{stem}_{variant}.png"
            figures.save_matrix(path, matrix, found[0]["objects"], rows, f"I-AUROC, {variant}, {modality}, {protocol}")
        curves = {METRICS[m]: {variant: retention(found, m) for variant, found in variants.items()} for m in _CURVES}
        if len(next(iter(variants.values()))[0]["steps"]) > 1:
            title = f"Objects of the base step, {modality}, protocol {protocol}"
            figures.save_curves(workdir / f"forgetting_{stem}.png", curves, title)


def retention(found: list[dict[str, Any]], metric: str) -> NDArray:
    """(seeds, steps): the mean over the base step's objects after every step."""
    base = [found[0]["objects"].index(name) for name in found[0]["steps"][0]]
    return np.stack([np.nanmean(_matrix(run, metric)[:, base], axis=1) for run in found])


def markdown(runs: Runs) -> str:
    """All protocols in the paper's form, then one table of each, with the paper's printed numbers where the dataset is
    the real one.
    """
    protocols = sorted({cell.protocol for cell in runs}, key=lambda text: [-int(n) for n in text.split("-")])
    parts = ["# Comparison", "I-AUROC / AUPRO / FM of I-AUROC:", _overview(runs, protocols)]
    for protocol in protocols:
        chosen = {cell: found for cell, found in runs.items() if cell.protocol == protocol}
        single = all(len(found[0]["steps"]) == 1 for found in chosen.values())
        columns = {title: key for title, key in _COLUMNS.items() if not (single and key[0] != "final")}
        rows = []
        for cell, found in chosen.items():
            printed = published.printed(found[0]["config"]["dataset"]["name"], *cell)
            cells = [_cell(*_spread(found, *key)) for key in columns.values()]
            rows.append([cell.modality, cell.variant, len(found), *cells, *printed.values()])
        headers = ["modality", "variant", "seeds", *columns]
        headers += [f"printed {title}" for title in printed]
        align = ["left", "left", *["right"] * (len(headers) - 2)]
        parts += [f"## {protocol}", tabulate(rows, headers, "github", disable_numparse=True, colalign=align)]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def _overview(runs: Runs, protocols: list[str]) -> str:
    """One line per modality and variant, one column per protocol."""

    def entry(cell: Cell) -> str:
        if cell not in runs:
            return "not measured"
        return " / ".join(_cell(*_spread(runs[cell], *_COLUMNS[title])) for title in _OVERVIEW)

    lines = sorted({(cell.modality, cell.variant) for cell in runs})
    rows = [[*line, *(entry(Cell(protocol, *line)) for protocol in protocols)] for line in lines]
    return tabulate(rows, ["modality", "variant", *protocols], "github", disable_numparse=True)


def as_csv(runs: Runs) -> str:
    """Every figure of every metric, one line each; empty where undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*Cell._fields, "metric", "figure", "seeds", "mean", "std"])
    for cell, found in runs.items():
        for metric in found[0]["matrix"]:
            for figure in SUMMARY:
                values = ("" if np.isnan(value) else repr(float(value)) for value in _spread(found, figure, metric))
                writer.writerow([*cell, metric, figure, len(found), *values])
    return file.getvalue()


def _spread(found: list[dict[str, Any]], figure: str, metric: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds; NaN where undefined."""
    values = np.array([run["summary"][metric][figure] for run in found], float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _cell(mean: float, deviation: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{100 * mean:z.1f}" + ("" if np.isnan(deviation) else f" ± {100 * deviation:.1f}")


def _matrix(run: dict[str, Any], metric: str) -> NDArray:
    return np.array(run["matrix"][metric], float)
