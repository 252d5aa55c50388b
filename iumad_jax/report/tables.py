"""A run's results as tables on the console, as results.md and as results.json.

`results` is the dictionary of results.json: `config`, `protocol`, `objects` (the columns of every matrix), `steps` (the
objects learned at each), `matrix` (metric -> steps done x objects, NaN or None where not learned or undefined),
`summary` (of `summarise`), `seconds` and `versions`. `floors` holds, by name, the `matrix` and `summary` of the
training-free methods on the same inputs. `bytes`, in `results` and in each floor, is what the method keeps. `decisions`
holds, for every step, what `iumad_jax.decisions.calibrate` returns, with `test` (of `rates`) beside every object's
thresholds. `unknown`, of an evaluation, is what `iumad_jax.decisions.unknown_rates` returns.
"""

import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from iumad_jax.errors import UserError
from iumad_jax.metrics import aggregate_forgetting, average_accuracy, final, forgetting, plasticity
from iumad_jax.report.ledger import as_json, write_whole

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
_LEGEND = (
    "final: mean over objects after the last step; acc: mean over steps of the mean over objects seen;\n"
    "fm: mean fall from an object's best earlier value; fm_aggregate: mean fall of the mean from the base step's;\n"
    "new: mean at the step that learned the object."
)
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


def gather(
    config: dict[str, Any],
    objects: Sequence[str],
    steps: Sequence[Sequence[str]],
    matrices: dict[str, dict[str, Any]],
    sizes: dict[str, int],
    decisions: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The results of a config's method and, under the same protocol, of other systems as its floors.

    Args:
        config: of the run.
        objects: the columns of all matrices.
        steps: the objects learned at each.
        matrices: by system and metric.
        sizes: by system, the bytes that it keeps.
        decisions: after every step.
        seconds: that it took.
    """
    by_system = {
        name: {"matrix": matrix, "summary": summarise(matrix), "bytes": sizes[name]}
        for name, matrix in matrices.items()
    }
    return {
        "config": config,
        "protocol": config["protocol"],
        "objects": list(objects),
        "steps": [list(step) for step in steps],
        **by_system.pop(config["method"]),
        "floors": by_system,
        "decisions": decisions,
        "seconds": seconds,
        "versions": {package: version(package) for package in ("iumad-jax", "jax", "flax", "optax", "numpy")},
    }


def console(results: dict[str, Any], workdir: Path) -> str:
    """Every object after the last step, what was learned and forgotten, and where the rest lies."""
    return "\n\n".join([*_overview(results, "simple"), f"Tables, ledger and heatmap pictures are in {workdir}."])


def markdown(results: dict[str, Any]) -> str:
    """Every object after the last step, what was learned and forgotten, and the whole matrix of every metric."""
    config = results["config"]
    title = f"# {config['method']} on {config['dataset']['name']}, {config['modality']}, protocol {results['protocol']}"
    learned = _learned(results)
    parts = [title, *_overview(results, "github")]
    for metric in _shown(results):
        rows = [
            [name, step, *(_cell(row[c]) if first <= step else "" for first, _, c in learned), _cell(final([row]))]
            for name, system in _systems(results).items()
            for step, row in enumerate(system["matrix"][metric])
        ]
        headers = ["method", "after step", *(name for _, name, _ in learned), "mean"]
        parts += [f"## {METRICS[metric]} after every step", _table(rows, headers, "github")]
    return "\n\n".join([*parts, *_decisions(results)]) + "\n"


def write_results(workdir: Path, results: dict[str, Any]) -> None:
    """Write results.md and then results.json, each whole or not at all.

    Raises:
        UserError: the disk is full or the workdir not writable.
    """
    write_whole(workdir / "results.md", markdown(results).encode())
    write_whole(workdir / "results.json", (json.dumps(as_json(results), allow_nan=False, indent=1) + "\n").encode())


def read_results(workdir: Path) -> dict[str, Any] | None:
    """The results of a finished run, or None.

    Raises:
        UserError: results.json cannot be read.
    """
    path = workdir / "results.json"
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it to have the run write it again") from error


def _overview(results: dict[str, Any], style: str) -> Iterator[str]:
    learned, systems = _learned(results), _systems(results)
    columns = [metric for metric in _shown(results) if metric != "aupro_exact"]
    last = {metric: results["matrix"][metric][-1] for metric in columns}

    rows = [[name, step, *(_cell(last[metric][column]) for metric in columns)] for step, name, column in learned]
    for name, system in systems.items():
        mean = "mean" if system is results else f"mean of {name}"
        rows.append([mean, "", *(_cell(system["summary"][metric]["final"]) for metric in columns)])
    yield _table(rows, ["object", "step", *(METRICS[metric] for metric in columns)], style)

    gaps = {metric: sum(_undefined(last[metric][column]) for _, _, column in learned) for metric in columns}
    if any(gaps.values()):
        reasons = (f"{gaps[metric]} of {METRICS[metric]} ({_UNDEFINED[metric]})" for metric in columns if gaps[metric])
        yield f"Undefined (-) and left out of the means: {'; '.join(reasons)}."

    unbeaten = [
        f"{METRICS[metric]} ({name} {_cell(floor['summary'][metric]['final'])})"
        for metric in columns
        for name, floor in results.get("floors", {}).items()
        if not _undefined(ours := results["summary"][metric]["final"]) and ours <= floor["summary"][metric]["final"]
    ]
    if unbeaten:
        yield f"Not above a training-free floor, so nothing is shown, in: {', '.join(unbeaten)}."

    rows = [
        [METRICS[metric], name, *(_cell(system["summary"][metric][figure]) for figure in SUMMARY)]
        for metric in _shown(results)
        for name, system in systems.items()
    ]
    yield _table(rows, ["metric", "method", *SUMMARY], style)
    yield _LEGEND
    if len(results["matrix"]["i_auroc"]) == 1:
        yield "fm and fm_aggregate are undefined (-): with a single step there is nothing earlier to forget."
    if "bytes" in results:
        kept = ", ".join(f"{name} {system['bytes'] / 1e6:.1f} MB" for name, system in systems.items())
        yield f"Kept for later steps: {kept}."


def _decisions(results: dict[str, Any]) -> Iterator[str]:
    """What the thresholds of `iumad_jax.decisions` make of the test images, after every step."""
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
            image, test = of_object["image"], of_object["test"]
            interval = " to ".join(f"{end:.4g}" for end in image["interval"])
            promise = "none: training images" if image["at_most"] is None else f"at most {image['at_most']:.1%}"
            cells = (_percent(test[key]) for key in ("false_alarms", "misses", "recognised", "taken_as_unknown"))
            rows.append([name, step, image["images"], f"{image['threshold']:.4g} ({interval})", promise, *cells])
    headers = ["object", "after step", "calibration images", "threshold of the score", "false alarms promised"]
    headers += ["false alarms", "misses", "recognised", "taken as unknown"]
    yield _table(rows, headers, "github")
    unknown = results.get("unknown", {"objects": {}})
    if unknown["objects"]:
        yield "## Objects that were never learned"
        yield (
            f"Of the images of learned objects {_percent(unknown['taken_as_unknown'])} are taken as unknown."
            f" Images of objects never learned are ranked above them with an AUROC of"
            f" {_cell(unknown['auroc_distance'])} by their distance from what was learned, and of"
            f" {_cell(unknown['auroc_logits'])} by the lack of confidence of the method's own object logits."
        )
        never = [[name, _percent(share)] for name, share in unknown["objects"].items()]
        yield _table(never, ["object never learned", "flagged as unknown"], "github")


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1%}"


def _systems(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The run's own method, then the floors."""
    return {results["config"]["method"]: results, **results.get("floors", {})}


def _shown(results: dict[str, Any]) -> list[str]:
    return [metric for metric in METRICS if metric in results["matrix"]]


def _learned(results: dict[str, Any]) -> list[tuple[int, str, int]]:
    """The (step, object, column) learned so far, in the protocol's order."""
    done = len(results["matrix"]["i_auroc"])
    steps = enumerate(results["steps"][:done])
    return [(step, name, results["objects"].index(name)) for step, names in steps for name in names]


def _undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:z.3f}"


def _table(rows: list[list[Any]], headers: list[str], style: str) -> str:
    return tabulate(rows, headers, style, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])
