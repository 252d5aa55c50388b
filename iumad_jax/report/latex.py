"""Formats a run's results as results.tex."""

import math
from typing import Any

import numpy as np

from iumad_jax.metrics import drops, final, forgetting
from iumad_jax.report import tables


def table(results: dict[str, Any]) -> str:
    """Format results.tex, a table like the paper's.

    It holds I-AUROC, AUPRO and the forgetting of both in percent, the best value of a row in bold, with the intervals
    of I-AUROC and AUPRO below. It needs the packages booktabs and graphicx and is never wider than the line.
    """
    methods, learned = tables.methods_of(results), tables.learned_objects(results)
    heads = ["I-AUROC", "AUPRO", "FM (I)", "FM (A)"]
    rows: dict[str, list[list[Any]]] = {name: [] for name in (*(name for _, name, _ in learned), "mean")}
    intervals: dict[str, list[list[Any]]] = {name: [] for name in rows}
    for method in methods.values():
        matrices = [method["matrix"][metric] for metric in ("i_auroc", "aupro")]
        last, forgotten = [matrix[-1] for matrix in matrices], [drops(matrix) for matrix in matrices]
        for _, name, column in learned:
            rows[name].append([values[column] for values in (*last, *forgotten)])
        rows["mean"].append([final(matrix) for matrix in matrices] + [forgetting(matrix) for matrix in matrices])
        ends = [method["intervals"][metric] for metric in ("i_auroc", "aupro")]
        for _, name, column in learned:
            intervals[name].append([metric_ends["objects"][column] for metric_ends in ends])
        intervals["mean"].append([metric_ends["mean"] for metric_ends in ends])
    groups = " & ".join(rf"\multicolumn{{{len(heads)}}}{{c}}{{{_tex(name)}}}" for name in methods)
    starts = range(2, 2 + len(methods) * len(heads), len(heads))
    return "\n".join(
        [
            f"% {tables.title(results)}; FM: the best earlier value minus the last",
            "% in brackets: 95 % bootstrap interval over test images",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(heads) * len(methods)}}}",
            r"\toprule",
            rf"& {groups} \\",
            "".join(rf"\cmidrule(lr){{{start}-{start + len(heads) - 1}}}" for start in starts),
            rf"object & {' & '.join(heads * len(methods))} \\",
            r"\midrule",
            *(_tex_row(name, rows.pop(name), intervals.pop(name)) for _, name, _ in learned),
            r"\midrule",
            _tex_row("mean", rows.pop("mean"), intervals.pop("mean")),
            r"\bottomrule",
            r"\end{tabular}}%",
            "",
        ]
    )


def _tex_row(name: str, by_method: list[list[Any]], intervals: list[list[Any]]) -> str:
    """Format the values of a row, and the intervals of each method's first two on a second line, if there are any."""
    percent = np.round(100 * np.array(by_method, float), 1)
    best = [*np.fmax.reduce(percent[:, :2]), *np.fmin.reduce(percent[:, 2:])]
    cells = [
        "--" if math.isnan(v) else rf"\textbf{{{v:z.1f}}}" if v == top and len(percent) > 1 else f"{v:z.1f}"
        for values in percent
        for v, top in zip(values, best, strict=True)
    ]
    row = rf"{_tex(name)} & {' & '.join(cells)} \\"
    ends = 100 * np.array(intervals, float)  # (methods, 2, 2)
    if np.isnan(ends).all():
        return row
    brackets = [
        "" if math.isnan(low + high) else rf"\scriptsize[{low:.0f}, {high:.0f}]"
        for method in ends
        for low, high in (*method, *[(math.nan, math.nan)] * 2)  # forgetting has no interval
    ]
    return f"{row}\n& {' & '.join(brackets)} \\\\"


def _tex(text: str) -> str:
    """Escape TeX's special characters."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(words.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
