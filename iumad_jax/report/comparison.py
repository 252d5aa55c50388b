"""Compares finished runs: tables in the paper's form, and the forgetting of each variant.

Every run has a folder named after its variant, modality, protocol and seed.
"""

import csv
import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from iumad_jax.report import figures, published, result_files
from iumad_jax.report.tables import METRICS, SUMMARY
from iumad_jax.runtime.storage import write_whole

_COLUMNS = {  # columns of a protocol's table: (figure, metric)
    **{METRICS[metric]: ("final", metric) for metric in ("i_auroc", "aupro", "p_auroc_object", "aupro_object")},
    **{f"FM {METRICS[metric]}": ("fm", metric) for metric in ("i_auroc", "aupro", "p_auroc_object")},
    **{f"aggregate FM {METRICS[metric]}": ("fm_aggregate", metric) for metric in ("i_auroc", "aupro")},
    **{f"new {METRICS[metric]}": ("new", metric) for metric in ("i_auroc", "aupro")},
}
_OVERVIEW = [METRICS["i_auroc"], METRICS["aupro"], f"FM {METRICS['i_auroc']}"]
_CURVES = ("i_auroc", "aupro", "p_auroc_object")
_LEGEND = (
    "Percent; mean over objects, then mean over seeds ± standard deviation (n - 1). Without a prefix: after the last\n"
    "step; [low, high]: 95 % bootstrap interval over test images, not over seeds; mean of each end over seeds.\n"
    "FM: mean drop of objects from their best earlier value (Chaudhry et al.). aggregate FM: how far the mean over\n"
    "the objects learned so far lies below its value after the base step, averaged over later steps.\n"
    "new: value right after an object was learned. `feature_norm`, `gaussian` and `memory_bank` are training-free\n"
    "baselines. `joint` is not incremental: it trains on all objects learned so far."
)


class Cell(NamedTuple):
    """A cell of the comparison; it has one run per seed."""

    protocol: str
    modality: str
    variant: str


Runs = dict[Cell, list[dict[str, Any]]]  # results of each cell, one per seed


def name(variant: str, modality: str, protocol: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{variant}_{modality}_{protocol}_seed{seed}"


def gather(workdir: Path) -> Runs:
    """Read the finished runs in `workdir/cells`, with the baselines that ran in them."""
    runs: dict[Cell, dict[str, Any]] = defaultdict(dict)  # by seed: several variants may have run the baselines
    for folder in sorted((workdir / "cells").glob("*")):
        results = result_files.read(folder)
        if results is not None:
            variant, modality, protocol, seed = folder.name.rsplit("_", 3)
            shared = {key: results[key] for key in ("config", "objects", "steps")}
            for name, values in {variant: results, **results["baselines"]}.items():
                runs[Cell(protocol, modality, name)][seed] = {**values, **shared}
    return {cell: list(by_seed.values()) for cell, by_seed in sorted(runs.items())}


def write(workdir: Path) -> str:
    """Write comparison.md and comparison.csv of all finished runs; return the content of comparison.md.

    Raises:
        UserError: If the disk is full or the workdir is not writable.
    """
    runs = gather(workdir)
    text = markdown(runs)
    write_whole(workdir / "comparison.md", text.encode())
    write_whole(workdir / "comparison.csv", as_csv(runs).encode())
    return text


def draw(workdir: Path) -> None:
    """Draw every variant's matrix, and the forgetting of all variants per protocol and modality."""
    runs = gather(workdir)
    for protocol, modality in {(cell.protocol, cell.modality) for cell in runs}:
        variants = {cell.variant: seed_runs for cell, seed_runs in runs.items() if cell[:2] == (protocol, modality)}
        stem = f"{protocol}_{modality}"
        for variant, seed_runs in variants.items():
            matrix = np.mean([_matrix(run, "i_auroc") for run in seed_runs], axis=0)
            rows = [f"step {index}" for index in range(len(matrix))]
            path = workdir / f"matrix_{stem}_{variant}.png"
            figures.save_matrix(
                path, matrix, seed_runs[0]["objects"], rows, f"I-AUROC, {variant}, {modality}, {protocol}"
            )
        curves = {
            METRICS[m]: {variant: retention(seed_runs, m) for variant, seed_runs in variants.items()} for m in _CURVES
        }
        if len(next(iter(variants.values()))[0]["steps"]) > 1:
            title = f"Objects of the base step, {modality}, protocol {protocol}"
            figures.save_curves(workdir / f"forgetting_{stem}.png", curves, title)


def retention(seed_runs: list[dict[str, Any]], metric: str) -> NDArray:
    """Return the mean over the base step's objects after every step, shape (seeds, steps)."""
    base = [seed_runs[0]["objects"].index(name) for name in seed_runs[0]["steps"][0]]
    return np.stack([np.nanmean(_matrix(run, metric)[:, base], axis=1) for run in seed_runs])


def markdown(runs: Runs) -> str:
    """Format an overview of all protocols, then one table each, with the paper's values for the paper's datasets."""
    protocols = sorted({cell.protocol for cell in runs}, key=lambda text: [-int(n) for n in re.findall(r"\d+", text)])
    parts = ["# Comparison", "I-AUROC / AUPRO / FM of I-AUROC:", _overview(runs, protocols)]
    for protocol in protocols:
        selected = {cell: seed_runs for cell, seed_runs in runs.items() if cell.protocol == protocol}
        single = all(len(seed_runs[0]["steps"]) == 1 for seed_runs in selected.values())
        columns = {title: key for title, key in _COLUMNS.items() if not (single and key[0] != "final")}
        rows = []
        for cell, seed_runs in selected.items():
            printed = published.printed(seed_runs[0]["config"]["dataset"]["name"], *cell)
            cells = [_cell(*_spread(seed_runs, *key)) + _interval(_ends(seed_runs, *key)) for key in columns.values()]
            rows.append([cell.modality, cell.variant, len(seed_runs), *cells, *printed.values()])
        headers = ["modality", "variant", "seeds", *columns]
        headers += [f"printed {title}" for title in printed]
        align = ["left", "left", *["right"] * (len(headers) - 2)]
        parts += [f"## {protocol}", tabulate(rows, headers, "github", disable_numparse=True, colalign=align)]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def _overview(runs: Runs, protocols: list[str]) -> str:
    """Format a table with one row per modality and variant and one column per protocol."""

    def entry(cell: Cell) -> str:
        if cell not in runs:
            return "not measured"
        return " / ".join(_cell(*_spread(runs[cell], *_COLUMNS[title])) for title in _OVERVIEW)

    lines = sorted({(cell.modality, cell.variant) for cell in runs})
    rows = [[*line, *(entry(Cell(protocol, *line)) for protocol in protocols)] for line in lines]
    return tabulate(rows, ["modality", "variant", *protocols], "github", disable_numparse=True)


def as_csv(runs: Runs) -> str:
    """Format every figure of every metric, one per line; undefined ones are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*Cell._fields, "metric", "figure", "seeds", "mean", "std", "low", "high"])
    for cell, seed_runs in runs.items():
        for metric in seed_runs[0]["matrix"]:
            for figure in SUMMARY:
                values = (*_spread(seed_runs, figure, metric), *_ends(seed_runs, figure, metric))
                cells = ("" if np.isnan(value) else repr(float(value)) for value in values)
                writer.writerow([*cell, metric, figure, len(seed_runs), *cells])
    return file.getvalue()


def _spread(seed_runs: list[dict[str, Any]], figure: str, metric: str) -> tuple[float, float]:
    """Return mean and standard deviation over seeds; NaN where undefined."""
    values = np.array([run["summary"][metric][figure] for run in seed_runs], float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _ends(seed_runs: list[dict[str, Any]], figure: str, metric: str) -> NDArray:
    """Return the interval over test images (2,), averaged over seeds; NaN where undefined, as for all but `final`."""
    if figure != "final":
        return np.full(2, np.nan)
    return np.mean(np.array([run["intervals"][metric]["mean"] for run in seed_runs], float), axis=0)


def _cell(mean: float, deviation: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{100 * mean:z.1f}" + ("" if np.isnan(deviation) else f" ± {100 * deviation:.1f}")


def _interval(ends: NDArray) -> str:
    return "" if np.isnan(ends).any() else " [{:.0f}, {:.0f}]".format(*100 * ends)


def _matrix(run: dict[str, Any], metric: str) -> NDArray:
    return np.array(run["matrix"][metric], float)
