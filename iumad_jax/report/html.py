"""report.html: a whole run in one file that opens offline, on a phone too.

The page is page/report.html with its style and script set in; everything it shows is in one JSON object, and the script
sets text as text, so that no name in a dataset can become markup.
"""

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from tqdm import tqdm

from iumad_jax.report import samples, tables
from iumad_jax.report.samples import Samples
from iumad_jax.runtime import ledger, storage

BUDGET = 7_500_000  # bytes of pictures in a page
_PICKS = ("worst", "best", "median")  # in this order they are kept when not all fit
_DIGITS = 5  # of points on curves

_PAGES = PackageLoader("iumad_jax.report", "page")
_TEMPLATES = Environment(loader=_PAGES, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
_TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Writes report.html from the results, the ledger and the samples of a run.

    Args:
        workdir: where the ledger and the samples lie.
        results: what results.json holds.

    Raises:
        UserError: something is missing or damaged, or the page cannot be written.
    """
    done = len(results["matrix"]["i_auroc"])
    columns = tables.objects_of(results)
    tested = [(step, name) for step, name, column in columns if _is_tested(workdir, results, name, column)]
    last = {name: samples.load(workdir, done - 1, name) for _, name in tested}
    as_learned = {name: last[name] if step == done - 1 else samples.load(workdir, step, name) for step, name in tested}
    shown, left_out = _pictures(workdir, last, as_learned)
    page = {
        "results": results,
        "columns": columns,
        "metrics": {metric: tables.METRICS[metric] for metric in tables.measured(results)},
        "figures": tables.FIGURES,
        "methods": {
            name: {key: method[key] for key in ("matrix", "summary")}
            for name, method in tables.methods_of(results).items()
        },
        "remarks": list(tables.remarks(results)),
        "losses": [event for event in ledger.read(workdir / "ledger.jsonl") if event["event"] == "epoch"],
        "rates": samples.RATES,
        "curves": {name: _curves(of_object) for name, of_object in last.items()},
        "thresholds": {name: [_own(as_learned[name].thresholds), _own(last[name].thresholds)] for name in last},
        "samples": shown,
        "left_out": left_out,
    }
    storage.write_whole(workdir / "report.html", _fill(page, tables.title(results)).encode())


def _is_tested(workdir: Path, results: dict[str, Any], name: str, column: int) -> bool:
    """Whether the object has test images: it was evaluated, or its samples are there though no metric is defined."""
    last = [rows[-1][column] for rows in results["matrix"].values()]
    step = len(results["matrix"]["i_auroc"]) - 1
    return any(value is not None and not math.isnan(value) for value in last) or samples.exist(workdir, step, name)


def pick(of_object: Samples) -> list[tuple[int, str, int, int]]:
    """The best, the median and the worst test image of each kind by the score of the run's own method.

    Good images are the better the lower they score, defective ones the higher.

    Returns:
        (number of the image, "best", "median" or "worst", its rank from 1, out of how many).
    """
    scores = _own(of_object.scores)
    picked = []
    for kind in sorted(set(of_object.defects), key=lambda kind: (kind != "good", kind)):
        rows = [row for row, defect in enumerate(of_object.defects) if defect == kind]
        rows.sort(key=lambda row: -scores[row] if of_object.anomalous[row] else scores[row])
        places = {len(rows) // 2: "median", 0: "best", len(rows) - 1: "worst"}  # of fewer than three, the extremes
        picked += [(rows[place], name, place + 1, len(rows)) for place, name in sorted(places.items())]
    return picked


def _own(by_method: dict[str, NDArray]) -> NDArray:
    """The value of the run's own method, which comes first."""
    return next(iter(by_method.values()))


def _pictures(
    workdir: Path, last: dict[str, Samples], as_learned: dict[str, Samples]
) -> tuple[list[dict[str, Any]], int]:
    """What the page shows of the picked samples, and how many of them did not fit."""
    found: list[dict[str, Any]] = []
    for name, of_object in tqdm(last.items(), "report.html", unit="object", disable=None, leave=False):
        pictures = samples.load_pictures(workdir, name)
        for row, place, rank, count in pick(of_object):
            picture = pictures[row]
            found.append(
                {
                    "object": name,
                    "id": of_object.ids[row],
                    "defect": of_object.defects[row],
                    "anomalous": of_object.anomalous[row],
                    "pick": place,
                    "rank": [rank, count],
                    "scores": {method: scores[row] for method, scores in of_object.scores.items()},
                    "rgb": _webp(picture.rgb),
                    "relief": _webp(picture.relief) if picture.relief else None,
                    "size": picture.size,
                    "truth": picture.outline,
                    "maps": [_quantised(of_step, row) for of_step in (as_learned[name], of_object)],
                    "alarm": of_object.alarm[row],
                    "pixel_thresholds": [of_step.pixel_threshold[row] for of_step in (as_learned[name], of_object)],
                }
            )
    sizes = {id(one): len(json.dumps(storage.as_json(one))) for one in found}
    room, kept = BUDGET, set()
    for one in sorted(found, key=lambda one: _PICKS.index(one["pick"])):
        room -= sizes[id(one)]
        if room >= 0:
            kept.add(id(one))
    return [one for one in found if id(one) in kept], len(found) - len(kept)


def _quantised(of_step: Samples, row: int) -> dict[str, Any]:
    pixels = base64.b64encode(of_step.maps[row].tobytes()).decode()
    return {"pixels": pixels, "side": of_step.maps.shape[1], "low": of_step.low, "high": of_step.high}


def _curves(of_object: Samples) -> dict[str, Any]:
    """By method: the corners of the ROC curve of images, and the overlaps of the PRO curve."""
    curves = {}
    for method, scores in of_object.scores.items():
        both = 0 < np.count_nonzero(of_object.anomalous) < len(of_object.anomalous)
        roc = roc_curve(of_object.anomalous, scores)[:2] if both else ([], [])
        curves[method] = {
            "roc": np.round(roc, _DIGITS),
            "overlap": np.round(of_object.overlap[method], _DIGITS),
        }
    return curves


def _webp(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _fill(page: dict[str, Any], title: str) -> str:
    """The template with its parts; no script but this one may run, and nothing is fetched from anywhere."""
    script = '"use strict";\n' + "\n".join(map(_part, ("chart.js", "tables.js", "samples.js", "report.js")))
    return _TEMPLATES.get_template("report.html").render(
        title=title,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=_part("report.css"),
        script=script,
        data=storage.as_json(page),
    )


def _part(name: str) -> str:
    return _PAGES.get_source(_TEMPLATES, name)[0]
