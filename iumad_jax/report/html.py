"""Writes report.html, a run's results in one file that opens offline, on phones too.

The page is page/report.html with style and scripts inlined. All data is in one JSON object, and scripts insert it as
text, so that no name in a dataset can become markup.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from tqdm import tqdm

from iumad_jax.metrics import image_roc
from iumad_jax.report import history, samples, tables
from iumad_jax.report.samples import Samples
from iumad_jax.runtime import ledger, storage

BUDGET = 7_500_000  # bytes of pictures per page
_PICKS = ("worst", "best", "median")  # in the order of preference where not all pictures fit
_DIGITS = 5  # decimals of points on curves

_PAGES = PackageLoader("iumad_jax.report", "page")
_TEMPLATES = Environment(loader=_PAGES, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
_TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Write report.html from the results, the ledger and the samples of a run.

    Args:
        workdir: Folder with the ledger and the samples.
        results: Content of results.json.

    Raises:
        UserError: If a file is missing or damaged, or the page cannot be written.
    """
    columns = tables.learned_objects(results)
    steps = {name: _tested_steps(workdir, results, name, column) for _, name, column in columns}
    last = {name: samples.load(workdir, tested[-1], name) for name, tested in steps.items() if tested}
    as_learned = {name: samples.load(workdir, steps[name][0], name) for name in last}
    for name in last:  # an object that was updated may have other test images since
        if as_learned[name].ids != last[name].ids:
            as_learned[name] = last[name]
    shown, left_out = _pictures(workdir, last, as_learned)
    matrix = [[row[column] for _, _, column in columns] for row in results["matrix"]["i_auroc"]]
    rows = history.rows_of_steps(workdir, matrix, results["acts"], results["decisions"]) if len(matrix) > 1 else []
    page = {
        "results": results,
        "columns": columns,
        "learned": {name: tables.step_with_remarks(results, step, name) for step, name, _ in columns},
        "history": [history.HEADERS, *rows],
        "kinds": tables.kinds_of_defects(results),
        "metrics": {metric: tables.METRICS[metric] for metric in tables.measured(results)},
        "figures": tables.FIGURES,
        "methods": {
            name: {key: method[key] for key in ("matrix", "summary", "intervals")}
            for name, method in tables.methods_of(results).items()
        },
        "remarks": list(tables.remarks(results)),
        "losses": [event for event in ledger.read(workdir / "ledger.jsonl") if event["event"] == "epoch"],
        "rates": samples.RATES,
        "curves": {name: _curves(object_samples) for name, object_samples in last.items()},
        "thresholds": {name: [_first(as_learned[name].thresholds), _first(last[name].thresholds)] for name in last},
        "samples": shown,
        "left_out": left_out,
    }
    content = fill("report.html", ("chart.js", "tables.js", "samples.js", "report.js"), page, tables.title(results))
    storage.write_whole(workdir / "report.html", content.encode())


def _tested_steps(workdir: Path, results: dict[str, Any], name: str, column: int) -> list[int]:
    """Return the steps after which an object was tested: its samples exist, or are missing although metrics do not."""
    count = len(results["matrix"]["i_auroc"])
    tested = [step for step in range(count) if samples.exist(workdir, step, name)]
    last = [rows[-1][column] for rows in results["matrix"].values()]
    is_measured = any(value is not None and not math.isnan(value) for value in last)
    return tested or [count - 1] * is_measured


def pick(object_samples: Samples) -> list[tuple[int, str, int, int]]:
    """Pick the best, the median and the worst test image of each kind by the score of the run's method.

    The best good image has the lowest score, the best anomalous one the highest.

    Returns:
        (index of the image, "best", "median" or "worst", rank from 1, number of images of the kind) of each pick.
    """
    scores = _first(object_samples.scores)
    picked = []
    for kind in sorted(set(object_samples.defects), key=lambda kind: (kind != "good", kind)):
        rows = [row for row, defect in enumerate(object_samples.defects) if defect == kind]
        rows.sort(key=lambda row: -scores[row] if object_samples.anomalous[row] else scores[row])
        ranks = {len(rows) // 2: "median", 0: "best", len(rows) - 1: "worst"}  # extremes win where they coincide
        picked += [(rows[rank], name, rank + 1, len(rows)) for rank, name in sorted(ranks.items())]
    return picked


def _first(by_method: dict[str, NDArray]) -> NDArray:
    """Return the value of the run's method, which comes first."""
    return next(iter(by_method.values()))


def _pictures(
    workdir: Path, last: dict[str, Samples], as_learned: dict[str, Samples]
) -> tuple[list[dict[str, Any]], int]:
    """Return the picked samples as the page shows them, and how many of them did not fit."""
    shown: list[dict[str, Any]] = []
    for name, object_samples in tqdm(last.items(), "report.html", unit="object", disable=None, leave=False):
        pictures = samples.load_pictures(workdir, object_samples.pictures)
        for row, rank_name, rank, count in pick(object_samples):
            picture = pictures[row]
            shown.append(
                {
                    "object": name,
                    "id": object_samples.ids[row],
                    "defect": object_samples.defects[row],
                    "anomalous": object_samples.anomalous[row],
                    "pick": rank_name,
                    "rank": [rank, count],
                    "scores": {method: scores[row] for method, scores in object_samples.scores.items()},
                    "rgb": _webp(picture.rgb),
                    "relief": _webp(picture.relief) if picture.relief else None,
                    "size": picture.size,
                    "truth": picture.outline,
                    "maps": [_quantised(state, row) for state in (as_learned[name], object_samples)],
                    "alarm": object_samples.alarm[row],
                    "pixel_thresholds": [state.pixel_threshold[row] for state in (as_learned[name], object_samples)],
                }
            )
    sizes = [len(json.dumps(storage.as_json(sample))) for sample in shown]
    room, fitting = BUDGET, set()
    for index in sorted(range(len(shown)), key=lambda index: _PICKS.index(shown[index]["pick"])):
        room -= sizes[index]
        if room >= 0:
            fitting.add(index)
    return [sample for index, sample in enumerate(shown) if index in fitting], len(shown) - len(fitting)


def _quantised(object_samples: Samples, row: int) -> dict[str, Any]:
    pixels = base64.b64encode(object_samples.maps[row].tobytes()).decode()
    return {
        "pixels": pixels,
        "side": object_samples.maps.shape[1],
        "low": object_samples.low,
        "high": object_samples.high,
    }


def _curves(object_samples: Samples) -> dict[str, Any]:
    """Return, by method, the points of the ROC curve of images and the overlaps of the PRO curve."""
    curves = {}
    for method, scores in object_samples.scores.items():
        defined = 0 < np.count_nonzero(object_samples.anomalous) < len(object_samples.anomalous)
        roc = np.array(image_roc(object_samples.anomalous, scores) if defined else ([], []))
        curves[method] = {
            "roc": np.round(roc, _DIGITS),
            "overlap": np.round(object_samples.overlap[method], _DIGITS),
        }
    return curves


def _webp(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def fill(template: str, scripts: Sequence[str], page: dict[str, Any], title: str) -> str:
    """Fill a template with data; its content security policy allows these scripts alone and no network access."""
    script = '"use strict";\n' + "\n".join(map(_part, scripts))
    return _TEMPLATES.get_template(template).render(
        title=title,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=_part("report.css"),
        script=script,
        data=storage.as_json(page),
    )


def _part(name: str) -> str:
    return _PAGES.get_source(_TEMPLATES, name)[0]
