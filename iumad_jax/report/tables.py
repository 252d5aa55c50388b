"""A run's results as tables on the console, and as results.md, .tex, .csv and .json.

`results` is the content of results.json, a dictionary with these entries:

    config, protocol   of the run
    objects            names of all objects; the columns of every matrix
    steps              the objects learned at each step
    matrix             metric -> (steps done, objects); NaN or None where an object is not yet learned or undefined
    summary            metric -> figure -> value, see `summarise`
    baselines          name -> `matrix`, `summary` and `bytes` of each training-free method on the same inputs
    bytes              bytes the method stores
    strategy_bytes     bytes the continual-learning strategy stores in addition
    decisions          one record per step, see `inference.thresholds.describe`; `test` holds the rates on test images
    seconds, versions  of the run
    unknown            evaluations only: see `inference.decisions.unknown_rates`
    evaluated          evaluations only: the run's `workdir`, the `step`, and how many objects were `learned` by then
"""

import csv
import html
import io
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from iumad_jax.errors import UserError
from iumad_jax.metrics import aggregate_forgetting, average_accuracy, falls, final, forgetting, plasticity
from iumad_jax.runtime.storage import as_json, write_whole

METRICS = {
    "i_auroc": "I-AUROC",
    "p_auroc": "P-AUROC",
    "aupro": "AUPRO",
    "aupro_exact": "AUPRO exact",
    "p_auroc_object": "object P-AUROC",
    "aupro_object": "object AUPRO",
    "p_auroc_workpiece": "workpiece P-AUROC",
    "aupro_workpiece": "workpiece AUPRO",
}
SUMMARY = {
    "final": final,
    "acc": average_accuracy,
    "fm": forgetting,
    "fm_aggregate": aggregate_forgetting,
    "new": plasticity,
}
FIGURES = {
    "final": "mean over objects after the last step",
    "acc": "mean over steps of the mean over objects seen",
    "fm": "mean fall from an object's best earlier value",
    "fm_aggregate": "mean fall of the mean from the base step's",
    "new": "mean at the step that learned the object",
}
_PIXELS = "no defective pixel or no normal one"
_OBJECT = f"no depth, {_PIXELS} on the object"
_UNDEFINED = {
    "i_auroc": "test images all good or all anomalous",
    "p_auroc": _PIXELS,
    "aupro": _PIXELS,
    "aupro_exact": _PIXELS,
    "p_auroc_object": _OBJECT,
    "aupro_object": _OBJECT,
    "p_auroc_workpiece": _OBJECT,
    "aupro_workpiece": _OBJECT,
}


def summarise(matrix: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of `SUMMARY` for every metric; NaN where undefined."""
    return {metric: {name: figure(rows) for name, figure in SUMMARY.items()} for metric, rows in matrix.items()}


def title(results: dict[str, Any]) -> str:
    """What was run, in a line."""
    config, evaluated = results["config"], results.get("evaluated")
    how = (
        f"after step {evaluated['step']} of {evaluated['workdir']}" if evaluated else f"protocol {results['protocol']}"
    )
    return f"{config['method']} on {config['dataset']['name']}, {config['modality']}, {how}"


def console(results: dict[str, Any], workdir: Path) -> str:
    """Every object after the last step, what was learned and forgotten, and where the rest lies."""
    kinds = "Report, tables and ledger" if "evaluated" in results else "Report, tables, ledger and heatmap pictures"
    return "\n\n".join([*_overview(results, "simple"), *_unknown(results, "simple"), f"{kinds} are in {workdir}."])


def markdown(results: dict[str, Any]) -> str:
    """Every object after the last step, what was learned and forgotten, and the whole matrix of every metric."""
    learned = objects_of(results)
    parts = [f"# {title(results)}", *_overview(results, "github")]
    for metric in measured(results):
        rows = [
            [name, step, *(_cell(row[c]) if first <= step else "" for first, _, c in learned), _cell(final([row]))]
            for name, method in methods_of(results).items()
            for step, row in enumerate(method["matrix"][metric])
        ]
        headers = ["method", "after step", *(name for _, name, _ in learned), "mean"]
        parts += [f"## {METRICS[metric]} after every step", _table(rows, headers, "github")]
    return "\n\n".join([*parts, *_decisions(results)]) + "\n"


def latex(results: dict[str, Any]) -> str:
    """The paper's table: I-AUROC, AUPRO and how far both fell, in percent, the best of a row in bold.

    It needs the packages booktabs and graphicx, and is never wider than the line it stands in.
    """
    methods, learned = methods_of(results), objects_of(results)
    heads = ["I-AUROC", "AUPRO", "FM (I)", "FM (A)"]
    rows: dict[str, list[list[Any]]] = {name: [] for name in (*(name for _, name, _ in learned), "mean")}
    for method in methods.values():
        matrices = [method["matrix"][metric] for metric in ("i_auroc", "aupro")]
        last, lost = [matrix[-1] for matrix in matrices], [falls(matrix) for matrix in matrices]
        for _, name, column in learned:
            rows[name].append([of_metric[column] for of_metric in (*last, *lost)])
        rows["mean"].append([final(matrix) for matrix in matrices] + [forgetting(matrix) for matrix in matrices])
    groups = " & ".join(rf"\multicolumn{{{len(heads)}}}{{c}}{{{_tex(name)}}}" for name in methods)
    starts = range(2, 2 + len(methods) * len(heads), len(heads))
    return "\n".join(
        [
            f"% {title(results)}; FM: the best earlier value minus the last",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(heads) * len(methods)}}}",
            r"\toprule",
            rf"& {groups} \\",
            "".join(rf"\cmidrule(lr){{{start}-{start + len(heads) - 1}}}" for start in starts),
            rf"object & {' & '.join(heads * len(methods))} \\",
            r"\midrule",
            *(_tex_row(name, rows.pop(name)) for _, name, _ in learned),
            r"\midrule",
            _tex_row("mean", rows.pop("mean")),
            r"\bottomrule",
            r"\end{tabular}}%",
            "",
        ]
    )


def _tex_row(name: str, by_method: list[list[Any]]) -> str:
    percent = np.round(100 * np.array(by_method, float), 1)
    best = [*np.fmax.reduce(percent[:, :2]), *np.fmin.reduce(percent[:, 2:])]
    cells = [
        "--" if math.isnan(v) else rf"\textbf{{{v:z.1f}}}" if v == top and len(percent) > 1 else f"{v:z.1f}"
        for values in percent
        for v, top in zip(values, best, strict=True)
    ]
    return rf"{_tex(name)} & {' & '.join(cells)} \\"


def _tex(text: str) -> str:
    """Text without meaning to TeX."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(words.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


def comma_separated(results: dict[str, Any]) -> str:
    """Every metric of every object after the last step, and how far it fell, by method; the means come last."""
    metrics, file = metrics_of(results), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "object", "step", *metrics, *(f"fm_{metric}" for metric in metrics)])
    for name, method in methods_of(results).items():
        matrices = [method["matrix"][metric] for metric in metrics]
        columns = [*(matrix[-1] for matrix in matrices), *(falls(matrix) for matrix in matrices)]
        means = [*map(final, matrices), *map(forgetting, matrices)]
        for step, object_, column in objects_of(results):
            writer.writerow([name, spreadsheet_text(object_), step, *(_number(values[column]) for values in columns)])
        writer.writerow([name, "mean", "", *map(_number, means)])
    return file.getvalue()


def spreadsheet_text(value: Any) -> Any:
    """A name as a spreadsheet shows it, where it would take it for a formula and compute it; numbers as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _number(value: float | None) -> str:
    """All digits of a number, nothing where it is undefined."""
    return "" if value is None or math.isnan(value) else repr(float(value))


def write_results(workdir: Path, results: dict[str, Any]) -> None:
    """Write results.md, results.tex, results.csv and then results.json, each whole or not at all.

    Raises:
        UserError: the disk is full or the workdir not writable.
    """
    write_whole(workdir / "results.md", markdown(results).encode())
    write_whole(workdir / "results.tex", latex(results).encode())
    write_whole(workdir / "results.csv", comma_separated(results).encode())
    write_whole(workdir / "results.json", (json.dumps(as_json(results), allow_nan=False, indent=1) + "\n").encode())


def read_results(workdir: Path) -> dict[str, Any] | None:
    """The results of a finished run, or None.

    Raises:
        UserError: results.json cannot be read.
    """
    path = workdir / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_bytes())
        markdown(results)  # what cannot be shown is damaged
        return results
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it to have the run write it again") from error


def _overview(results: dict[str, Any], style: str) -> Iterator[str]:
    learned, methods, metrics = objects_of(results), methods_of(results), measured(results)
    columns = [metric for metric in metrics if metric != "aupro_exact"]
    last = {metric: results["matrix"][metric][-1] for metric in columns}

    rows: list[list[Any]] = [
        [name, step, *(_cell(last[metric][column]) for metric in columns)] for step, name, column in learned
    ]
    if metrics:
        for name, method in methods.items():
            mean = "mean" if method is results else f"mean of {name}"
            rows.append([mean, "", *(_cell(method["summary"][metric]["final"]) for metric in columns)])
    yield _table(rows, ["object", "step", *(METRICS[metric] for metric in columns)], style)

    yield from remarks(results)

    if metrics:
        rows = [
            [METRICS[metric], name, *(_cell(method["summary"][metric][figure]) for figure in SUMMARY)]
            for metric in metrics
            for name, method in methods.items()
        ]
        yield _table(rows, ["metric", "method", *SUMMARY], style)
        explained = [f"{figure}: {meaning}" for figure, meaning in FIGURES.items()]
        yield "; ".join(explained[:2]) + ";\n" + "; ".join(explained[2:4]) + ";\n" + explained[4] + "."
        if len(results["matrix"]["i_auroc"]) == 1:
            yield "fm and fm_aggregate are undefined (-): with a single step there is nothing earlier to forget."
    if "bytes" in results:
        kept = ", ".join(f"{name} {method['bytes'] / 1e6:.1f} MB" for name, method in methods.items())
        yield f"Kept for later steps: {kept}."
    if "strategy_bytes" in results:
        yield _strategy(results)


def remarks(results: dict[str, Any]) -> Iterator[str]:
    """What must be said beside the numbers after the last step: which are undefined and why, and which show nothing."""
    if not measured(results):
        yield (
            "Nothing is measured: no object has both good and defective test images. Good images have set the"
            " thresholds, so that python -m iumad_jax.predict can judge new ones."
        )
        return
    learned = objects_of(results)
    columns = [metric for metric in metrics_of(results) if metric != "aupro_exact"]
    last = {metric: results["matrix"][metric][-1] for metric in columns}
    gaps = {metric: sum(_undefined(last[metric][column]) for _, _, column in learned) for metric in columns}
    if any(gaps.values()):
        reasons = (f"{gaps[metric]} of {METRICS[metric]} ({_UNDEFINED[metric]})" for metric in columns if gaps[metric])
        yield f"Undefined (-) and left out of the means: {'; '.join(reasons)}."

    unbeaten = [
        f"{METRICS[metric]} ({name} {_cell(baseline['summary'][metric]['final'])})"
        for metric in columns
        for name, baseline in results.get("baselines", {}).items()
        if not _undefined(ours := results["summary"][metric]["final"]) and ours <= baseline["summary"][metric]["final"]
    ]
    if unbeaten:
        yield f"Not above a training-free baseline, so nothing is shown, in: {', '.join(unbeaten)}."


def _strategy(results: dict[str, Any]) -> str:
    """What the strategy against forgetting keeps, and whether it may be compared with others."""
    learned = results.get("evaluated", {}).get("learned", len(results["objects"]))
    name, each = results["config"]["continual"]["strategy"], results["strategy_bytes"] / learned
    if name == "joint":
        return (
            "Strategy joint is not incremental: every step trains on the images of all objects seen so far"
            f" ({each / 1e3:.1f} kB per object are kept). It is an upper bound for the others."
        )
    return f"Strategy {name} keeps {each / 1e3:.1f} kB per object beside the weights."


def _decisions(results: dict[str, Any]) -> Iterator[str]:
    """What the thresholds of `inference.decisions` make of the test images, after every step."""
    if not results.get("decisions"):
        return
    yield "## Decisions after every step"
    yield (
        "Thresholds are set by good calibration images, never by test images: of the scores of n, the smallest that at"
        " most 1 - quantile of further good images exceed on average, or, where n is too small to promise that, the"
        " largest. Beside each is its bootstrapped 95 % interval, whose upper end means nothing where it is the"
        " threshold itself."
    )
    rows = []
    for step, decided in enumerate(results["decisions"]):
        for name, of_object in decided["objects"].items():
            image, test = of_object["image"], of_object.get("test", {})
            interval = " to ".join(f"{end:.4g}" for end in image["interval"])
            promise = (
                "none: training images"
                if image["false_alarm_bound"] is None
                else f"at most {image['false_alarm_bound']:.1%}"
            )
            cells = (_percent(test.get(key)) for key in ("false_alarms", "misses", "recognised", "taken_as_unknown"))
            rows.append([name, step, image["images"], f"{image['threshold']:.4g} ({interval})", promise, *cells])
    headers = ["object", "after step", "calibration images", "threshold of the score", "false alarms promised"]
    headers += ["false alarms", "misses", "recognised", "taken as unknown"]
    yield _table(rows, headers, "github")
    if unknown := list(_unknown(results, "github")):
        yield "## Objects that were never learned"
        yield from unknown


def _unknown(results: dict[str, Any], style: str) -> Iterator[str]:
    """Whether images of objects that were never learned are found to be of none."""
    unknown = results.get("unknown", {"objects": {}})
    if unknown["objects"]:
        yield (
            f"Of the images of learned objects {_percent(unknown['taken_as_unknown'])} are taken as unknown."
            f" Images of objects never learned are ranked above them with an AUROC of"
            f" {_cell(unknown['auroc_distance'])} by their distance from what was learned, and of"
            f" {_cell(unknown['auroc_logits'])} by the lack of confidence of the method's own object logits."
        )
        never = [[name, _percent(share)] for name, share in unknown["objects"].items()]
        yield _table(never, ["object never learned", "flagged as unknown"], style)


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1%}"


def methods_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The run's own method, then the baselines."""
    return {results["config"]["method"]: results, **results.get("baselines", {})}


def metrics_of(results: dict[str, Any]) -> list[str]:
    """The metrics it has, in the order of `METRICS`."""
    return [metric for metric in METRICS if metric in results["matrix"]]


def measured(results: dict[str, Any]) -> list[str]:
    """The metrics that are defined for some object after some step, in the order of `METRICS`."""
    matrices = [method["matrix"] for method in methods_of(results).values()]
    defined = {m for matrix in matrices for m in matrix if not all(map(_undefined, itertools.chain(*matrix[m])))}
    return [metric for metric in METRICS if metric in defined]


def objects_of(results: dict[str, Any]) -> list[tuple[int, str, int]]:
    """The (step, object, column) learned so far, in the protocol's order."""
    done = len(results["matrix"]["i_auroc"])
    steps = enumerate(results["steps"][:done])
    return [(step, name, results["objects"].index(name)) for step, names in steps for name in names]


def _undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:z.3f}"


def _table(rows: list[list[Any]], headers: list[str], style: str) -> str:
    if style == "github":  # Markdown, where names could be markup
        rows = [[html.escape(str(cell), quote=False).replace("|", "\\|") for cell in row] for row in rows]
        headers = [html.escape(header, quote=False).replace("|", "\\|") for header in headers]
    return tabulate(rows, headers, style, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])
