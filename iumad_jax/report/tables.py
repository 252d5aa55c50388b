"""Formats a run's results for the console and as results.md; `result_files` describes the results."""

import html
import itertools
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from iumad_jax.metrics import aggregate_forgetting, average_accuracy, final, forgetting, plasticity

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
    "final": "mean over all objects after the last step",
    "acc": "mean over the steps of the mean over the objects learned so far",
    "fm": "forgetting: mean drop of each object from its best earlier value",
    "fm_aggregate": "how far the mean over objects lies below its value after the base step, mean over later steps",
    "new": "mean of each object's value right after it was learned",
}
RATES = {
    "false_alarms": "false alarms",
    "misses": "misses",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "recognised": "recognised",
    "taken_as_unknown": "taken as unknown",
}
_SHORT = ("i_auroc", "aupro", "p_auroc_object")  # metrics whose forgetting the console shows
_METRICS_EXPLAINED = (
    "I-AUROC: how well scores rank anomalous above good images (0.5 is chance, 1 perfect); P-AUROC: the same for the\n"
    "pixels of anomaly maps. AUPRO: mean share of a defect that is found, for up to 30 % of normal pixels marked.\n"
    "Prefix object: normal pixels are those of the object alone; workpiece: without parts cut off by the image.\n"
    "step: the step that learned the object."
)
_INTERVALS_EXPLAINED = (
    "[low, high]: 95 % bootstrap interval over test images, not over training seeds; it is too narrow at 1, where no\n"
    "image is ranked wrongly."
)
_PIXELS = "no anomalous pixel or no normal one"
_OBJECT = f"no depth, or {_PIXELS} on the object"
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
    """Compute the figures of `SUMMARY` for every metric; NaN where undefined."""
    return {metric: {name: figure(rows) for name, figure in SUMMARY.items()} for metric, rows in matrix.items()}


def title(results: dict[str, Any]) -> str:
    """Describe the run or evaluation in one line."""
    config, evaluated = results["config"], results.get("evaluated")
    model = (
        f"after step {evaluated['step']} of {evaluated['workdir']}" if evaluated else f"protocol {results['protocol']}"
    )
    return f"{config['method']} on {config['dataset']['name']}, {config['modality']}, {model}"


def console(results: dict[str, Any], workdir: Path) -> str:
    """Format the results for the console: decisions and pictures first, then metrics and forgetting.

    Args:
        results: Content of results.json.
        workdir: Folder of the run or evaluation, for paths and commands.
    """
    return "\n\n".join(
        [
            title(results),
            *_decisions_on_test_images(results, "simple"),
            *_unknown_objects(results, "simple"),
            _next_steps(results, workdir),
            *_metrics_of_objects(results, "simple"),
            *_learning_and_forgetting(results, "simple", [m for m in measured(results) if m in _SHORT]),
            *_stored(results),
            f"All metrics, tables and the ledger are in {workdir}.",
        ]
    )


def markdown(results: dict[str, Any]) -> str:
    """Format results.md: the console's tables for every metric, then metrics and decisions after every step."""
    learned = learned_objects(results)
    parts = [
        f"# {title(results)}",
        *_decisions_on_test_images(results, "github"),
        *_metrics_of_objects(results, "github"),
        *_kinds_section(results),
        *_learning_and_forgetting(results, "github", measured(results)),
        *_stored(results),
    ]
    for metric in measured(results):
        rows = [
            [name, step, *(cell(row[c]) if first <= step else "" for first, _, c in learned), cell(final([row]))]
            for name, method in methods_of(results).items()
            for step, row in enumerate(method["matrix"][metric])
        ]
        headers = ["method", "after step", *(name for _, name, _ in learned), "mean"]
        parts += [f"## {METRICS[metric]} after every step", _table(rows, headers, "github")]
    return "\n\n".join([*parts, *_decisions_after_every_step(results)]) + "\n"


def _decisions_on_test_images(results: dict[str, Any], style: str) -> Iterator[str]:
    """Yield the error rates of the last step's decisions on test images, by object."""
    if not results.get("decisions"):
        return
    decided = results["decisions"][-1]["objects"]
    rates = _defined_rates([results["decisions"][-1]])
    rows: list[list[Any]] = []
    for step, name, _ in learned_objects(results):
        image, test = decided[name]["image"], decided[name].get("test", {})
        rows.append(
            [
                name,
                step_with_remarks(results, step, name),
                image["images"],
                _bound(image),
                *(percent(test.get(rate)) for rate in rates),
            ]
        )
    if rates:
        values = [[record.get("test", {}).get(rate) for record in decided.values()] for rate in rates]
        rows.append(["mean", "", "", "", *(percent(_mean(column)) for column in values)])
    headers = ["object", "step", "calibration images", "false-alarm bound", *(RATES[rate] for rate in rates)]
    yield _table(rows, headers, style)
    if rates:
        yield (
            "Decisions on test images, at thresholds set by good calibration images. False alarm: a good image whose\n"
            "score exceeds the threshold, expected at a rate of at most the bound, which more calibration images\n"
            "lower. Miss: an anomalous image whose score does not. Precision: share of alarms that are right; recall:\n"
            "share of anomalous images found; F1: their harmonic mean. Recognised: taken for the right object. Taken\n"
            "as unknown: too far from every learned object."
        )
    else:
        yield (
            "Thresholds are set by good calibration images. False alarms, good images whose scores exceed the\n"
            "threshold, are expected at a rate of at most the bound, which more calibration images lower."
        )
    if any(_bound(decided[name]["image"]) == "none" for _, name, _ in learned_objects(results)):
        yield (
            'Bound "none": the thresholds come from training images, which guarantee nothing; add good images for'
            " calibration."
        )


def _next_steps(results: dict[str, Any], workdir: Path) -> str:
    """Describe how to view pictures of test images, and how to predict new images."""
    tested = measured(results) or _defined_rates(results.get("decisions", []))
    lines = [f"Test images with their anomaly maps: open {workdir / 'report.html'} in a browser."] if tested else []
    if "evaluated" not in results:
        depth = " --depth=DEPTH" if "depth" in results["config"]["modality"] else ""
        command = f"python -m iumad_jax.predict --workdir={shlex.quote(str(workdir))}"
        lines.append(f"New images: {command} --input=IMAGES{depth} --output=FOLDER")
    return "\n".join(lines)


def _metrics_of_objects(results: dict[str, Any], style: str) -> Iterator[str]:
    """Yield the metrics of every object after the last step, with the means of all methods, and remarks on them."""
    if not (metrics := measured(results)):
        yield from remarks(results)
        return
    columns = [metric for metric in metrics if metric != "aupro_exact"]
    last = [results["matrix"][metric][-1] for metric in columns]
    ends = [results["intervals"][metric]["objects"] for metric in columns]
    one_line = style == "github"  # on the console, where wide lines break, means alone have intervals: on a second line

    def cells(values: list[float | None], intervals: list[Any]) -> list[str]:
        pairs = zip(values, intervals, strict=True)
        return [f"{cell(value)} {_interval(ends)}".strip() if one_line else cell(value) for value, ends in pairs]

    rows: list[list[Any]] = [
        [
            name,
            step_with_remarks(results, step, name),
            *cells([values[column] for values in last], [intervals[column] for intervals in ends]),
        ]
        for step, name, column in learned_objects(results)
    ]
    for name, method in methods_of(results).items():
        mean = "mean" if method is results else f"mean of {name}"
        intervals = [method["intervals"][metric]["mean"] for metric in columns]
        rows.append([mean, "", *cells([method["summary"][metric]["final"] for metric in columns], intervals)])
        if not one_line and any(brackets := list(map(_interval, intervals))):
            rows.append(["", "", *brackets])
    yield _table(rows, ["object", "step", *(METRICS[metric] for metric in columns)], style)
    yield f"{_METRICS_EXPLAINED}\n{_INTERVALS_EXPLAINED}"
    yield from remarks(results)


def remarks(results: dict[str, Any]) -> Iterator[str]:
    """Yield remarks on the metrics after the last step: undefined values, and baselines not beaten."""
    if not measured(results):
        yield (
            "No metric is defined: no object has both good and anomalous test images. Thresholds are set by good"
            " images, so python -m iumad_jax.predict can judge new ones."
        )
        return
    learned = learned_objects(results)
    columns = [metric for metric in metrics_of(results) if metric != "aupro_exact"]
    last = {metric: results["matrix"][metric][-1] for metric in columns}
    gaps: dict[tuple[int, str], list[str]] = {}
    for metric in columns:
        if count := sum(undefined(last[metric][column]) for _, _, column in learned):
            gaps.setdefault((count, _UNDEFINED[metric]), []).append(METRICS[metric])
    if gaps:
        reasons = (
            f"{', '.join(names)} of {count} {'object' if count == 1 else 'objects'} ({reason})"
            for (count, reason), names in gaps.items()
        )
        yield f"Undefined and left out of the means: {'; '.join(reasons)}."

    for name, baseline in results.get("baselines", {}).items():
        pairs = [(results["summary"][m]["final"], baseline["summary"][m]["final"], METRICS[m]) for m in columns]
        unbeaten = [
            f"{metric} ({cell(value)} against {cell(baseline_value)})"
            for value, baseline_value, metric in pairs
            if not undefined(value) and value <= baseline_value
        ]
        if unbeaten:
            yield f"No better than the training-free baseline {name} in {', '.join(unbeaten)}."


def _kinds_section(results: dict[str, Any]) -> Iterator[str]:
    headers, *rows = kinds_of_defects(results)
    if rows:
        yield "## Kinds of defects"
        yield _table(rows, headers, "github")
        yield (
            "In the last test of each object, the images of a kind against the good images (I-AUROC), and its defects"
            " against the normal pixels of all test images; means of the objects that have the kind. Alarms: share of"
            " its images whose scores exceed the threshold."
        )


def kinds_of_defects(results: dict[str, Any]) -> list[list[str]]:
    """Return the headers and rows of a table of how well each method finds each kind; no rows for a single kind."""
    by_method = {name: list(method.get("kinds", {}).values()) for name, method in methods_of(results).items()}
    kinds = sorted({kind for records in by_method.values() for record in records for kind in record})
    columns = [metric for metric in measured(results) if metric != "aupro_exact"]
    table = [["kind", "method", "images", "alarms", *(METRICS[metric] for metric in columns)]]
    for kind, (method, records) in itertools.product(kinds if len(kinds) > 1 else [], by_method.items()):
        found = [record[kind] for record in records if kind in record]
        images = sum(record["images"] for record in found)
        alarms = sum(record["images"] * record.get("alarms", math.nan) for record in found) / images
        means = (cell(_mean([record[metric] for record in found])) for metric in columns)
        table.append([kind, method, str(images), percent(alarms), *means])
    return table


def _learning_and_forgetting(results: dict[str, Any], style: str, metrics: list[str]) -> Iterator[str]:
    """Yield the figures of `SUMMARY` by metric and method; with a single step they all equal the means above."""
    if not metrics:
        return
    if evaluated := results.get("evaluated"):
        yield f"Forgetting is measured by the run itself: see {Path(evaluated['workdir']) / 'results.md'}."
        return
    if len(results["matrix"][metrics[0]]) == 1:
        yield "With a single step nothing can be forgotten."
        return
    rows = [
        [METRICS[metric], name, *(cell(method["summary"][metric][figure]) for figure in SUMMARY)]
        for metric in metrics
        for name, method in methods_of(results).items()
    ]
    yield _table(rows, ["metric", "method", *SUMMARY], style)
    yield "\n".join(f"{figure}: {meaning}" for figure, meaning in FIGURES.items())


def _stored(results: dict[str, Any]) -> Iterator[str]:
    """Yield how many bytes the methods and the strategy store."""
    if "bytes" in results:
        sizes = ", ".join(f"{name} {method['bytes'] / 1e6:.1f} MB" for name, method in methods_of(results).items())
        yield f"Stored: {sizes}."
    if "strategy_bytes" not in results:
        return
    learned = results.get("evaluated", {}).get("learned", len(results["objects"]))
    name, kilobytes = results["config"]["continual"]["strategy"], results["strategy_bytes"] / 1e3
    if name == "joint":
        yield (
            "Strategy joint is not incremental: every step trains on the images of all objects learned so far"
            f" ({kilobytes / learned:.1f} kB per object). It is an upper bound for the other strategies."
        )
    elif name in ("iuf", "isvd"):
        yield f"Strategy {name} stores {kilobytes:.1f} kB in addition to the weights, whatever the number of objects."
    else:
        yield f"Strategy {name} stores {kilobytes / learned:.1f} kB per object in addition to the weights."


def _decisions_after_every_step(results: dict[str, Any]) -> Iterator[str]:
    """Yield thresholds and error rates of all objects after every step."""
    if not results.get("decisions"):
        return
    yield "## Decisions after every step"
    yield (
        "Thresholds are conformal: of the scores of n good calibration images, the smallest one that a further good"
        " image exceeds with a probability of at most 1 - config.decisions.quantile; or, where n is too small for that,"
        " the largest. Each has a bootstrapped 95 % interval, whose upper end is too low where it equals the threshold."
    )
    rates, rows = _defined_rates(results["decisions"]), []
    for step, decided in enumerate(results["decisions"]):
        for name, record in decided["objects"].items():
            image, test = record["image"], record.get("test", {})
            interval = " to ".join(f"{end:.4g}" for end in image["interval"])
            threshold = f"{image['threshold']:.4g} ({interval})"
            cells = (percent(test.get(rate)) for rate in rates)
            rows.append([name, step, image["images"], threshold, _bound(image), *cells])
    headers = ["object", "after step", "calibration images", "score threshold", "false-alarm bound"]
    headers += [RATES[rate] for rate in rates]
    yield _table(rows, headers, "github")
    if unknown := list(_unknown_objects(results, "github")):
        yield "## Objects that were never learned"
        yield from unknown


def _unknown_objects(results: dict[str, Any], style: str) -> Iterator[str]:
    """Yield how well images of objects that were never learned are flagged as unknown."""
    unknown = results.get("unknown", {"objects": {}})
    if unknown["objects"]:
        shares = [[name, percent(share)] for name, share in unknown["objects"].items()]
        yield _table(shares, ["object never learned", "taken as unknown"], style)
        yield (
            f"Of the images of learned objects, {percent(unknown['taken_as_unknown'])} are taken as unknown. AUROC of"
            f" objects never learned against learned ones: {cell(unknown['auroc_distance'])} by the distance to the"
            f" nearest learned object, {cell(unknown['auroc_logits'])} by the method's own object logits."
        )


def _defined_rates(decisions: list[dict[str, Any]]) -> list[str]:
    """Return the rates that are defined for any object after any step."""
    tests = [record.get("test", {}) for decided in decisions for record in decided["objects"].values()]
    return [rate for rate in RATES if not all(undefined(test.get(rate)) for test in tests)]


def _bound(image: dict[str, Any]) -> str:
    if image.get("chosen"):
        return "chosen"
    return "none" if image["false_alarm_bound"] is None else f"{image['false_alarm_bound']:.1%}"


def percent(value: float | None) -> str:
    """Format a share; "-" if it is undefined."""
    return "-" if undefined(value) else f"{value:.1%}"


def _mean(values: list[float | None]) -> float:
    """Return the mean of the defined values, NaN without any."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def methods_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results of the run's method, then of its baselines, by name."""
    return {results["config"]["method"]: results, **results.get("baselines", {})}


def metrics_of(results: dict[str, Any]) -> list[str]:
    """Return the metrics in the results, in the order of `METRICS`."""
    return [metric for metric in METRICS if metric in results["matrix"]]


def measured(results: dict[str, Any]) -> list[str]:
    """Return the metrics that are defined for any object after any step, in the order of `METRICS`."""
    matrices = [method["matrix"] for method in methods_of(results).values()]
    defined = {m for matrix in matrices for m in matrix if not all(map(undefined, itertools.chain(*matrix[m])))}
    return [metric for metric in METRICS if metric in defined]


def learned_objects(results: dict[str, Any]) -> list[tuple[int, str, int]]:
    """Return the (step, object, column) of the objects learned so far, in the order of learning."""
    count = len(results["matrix"]["i_auroc"])
    steps = enumerate(results["steps"][:count])
    return [(step, name, results["objects"].index(name)) for step, names in steps for name in names]


def step_with_remarks(results: dict[str, Any], step: int, name: str) -> str:
    """Return the step that learned an object, and the one after which it was tested if that is not the last."""
    tested = results.get("tested", {}).get(name)
    acts = [act["act"] for act in results.get("acts", []) if name in act["objects"]]
    retired = [act for act in acts if act in ("retire", "restore")][-1:] == ["retire"]
    remarks = ["retired"] * retired + [f"tested after {tested}"] * (tested is not None)
    step = learned_in(results, step, name)
    return f"{step} ({', '.join(remarks)})" if remarks else str(step)


def learned_in(results: dict[str, Any], step: int, name: str) -> int:
    """Return the step of the run that learned an object, given the step of the results, an evaluation's being one."""
    return results.get("evaluated", {}).get("steps", {}).get(name, step)


def undefined(value: float | None) -> bool:
    """Return whether a value is NaN or None."""
    return value is None or math.isnan(value)


def cell(value: float | None) -> str:
    """Format a value; "-" if it is undefined."""
    return "-" if undefined(value) else f"{value:z.3f}"


def _interval(ends: tuple[float | None, float | None]) -> str:
    low, high = ends
    return "" if undefined(low) or undefined(high) else f"[{low:.2f}, {high:.2f}]"


def _table(rows: list[list[Any]], headers: list[str], style: str) -> str:
    if style == "github":  # names could be markup in Markdown
        rows = [[html.escape(str(cell), quote=False).replace("|", "\\|") for cell in row] for row in rows]
        headers = [html.escape(header, quote=False).replace("|", "\\|") for header in headers]
    return tabulate(rows, headers, style, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])
