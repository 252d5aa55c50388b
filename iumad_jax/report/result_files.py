"""Reads and writes the results of a run: results.json, and results.md, .tex and .csv made from it.

`results` is the content of results.json, a dictionary with these entries:

    config, protocol   of the run
    objects            names of all objects; the columns of every matrix
    steps              the objects learned at each step
    acts               by step: the `act` (learn, update, calibrate, retire or restore), its `objects`, and what was
                       measured `before` an update or calibration, by object: `i_auroc` and error rates
    tested             object -> step after which it was tested last, if later steps may have changed its maps
    matrix             metric -> (finished steps, objects); NaN or None where not yet learned or undefined
    summary            metric -> figure -> value, see `summarise`
    intervals          metric -> `objects`, the 95 % bootstrap interval over test images of every object after the last
                       step, shape (objects, 2), and `mean`, that of their mean; NaN or None where undefined
    kinds              object -> kind of defect -> number of `images`, share of `alarms` and all metrics, in the last
                       test of the object, see `inference.evaluation.Judgement`
    baselines          name -> `matrix`, `summary`, `intervals`, `kinds` and `bytes` of each training-free method
    bytes              bytes that the method stores
    strategy_bytes     bytes that the strategy against forgetting stores in addition
    decisions          one record per step, see `inference.thresholds.describe`; `test` holds the rates on test images
    seconds, versions  of the run
    unknown            evaluations only: see `inference.decisions.unknown_rates`
    evaluated          evaluations only: the run's `workdir`, the `step`, how many objects were `learned` by then, and
                       in which of its `steps` each was
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from iumad_jax.errors import UserError
from iumad_jax.metrics import drops, final, forgetting
from iumad_jax.report import latex, tables
from iumad_jax.runtime.storage import as_json, write_whole


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Write results.md, results.tex, results.csv and then results.json, each atomically.

    Raises:
        UserError: If the disk is full or the workdir is not writable.
    """
    write_whole(workdir / "results.md", tables.markdown(results).encode())
    write_whole(workdir / "results.tex", latex.table(results).encode())
    write_whole(workdir / "results.csv", comma_separated(results).encode())
    write_whole(workdir / "results.json", (json.dumps(as_json(results), allow_nan=False, indent=1) + "\n").encode())


def read(workdir: Path) -> dict[str, Any] | None:
    """Read results.json; None if the run is not finished.

    Raises:
        UserError: If the file is damaged, or written by a version with other keys.
    """
    path = workdir / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_bytes())
        if "intervals" not in results:
            raise UserError(f"{path} was written by an older version of iumad_jax; run again in another folder.")
        tables.markdown(results)  # results that cannot be shown are damaged
        return results
    except (OSError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the file and run the command again.") from error


def comma_separated(results: dict[str, Any]) -> str:
    """Format results.csv, by method: every metric of every object after the last step, its drop and its interval.

    Means come last.
    """
    metrics, file = tables.metrics_of(results), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    headers = [f"{prefix}{metric}" for prefix in ("", "fm_", "low_", "high_") for metric in metrics]
    writer.writerow(["method", "object", "step", *headers])
    for name, method in tables.methods_of(results).items():
        matrices, intervals = zip(*((method["matrix"][m], method["intervals"][m]) for m in metrics), strict=True)
        columns = [*(matrix[-1] for matrix in matrices), *(drops(matrix) for matrix in matrices)]
        means = [*map(final, matrices), *map(forgetting, matrices)]
        for end in (0, 1):
            columns += [[ends[end] for ends in interval["objects"]] for interval in intervals]
            means += [interval["mean"][end] for interval in intervals]
        for step, object_, column in tables.learned_objects(results):
            learned = tables.learned_in(results, step, object_)
            writer.writerow(
                [name, spreadsheet_text(object_), learned, *(_number(values[column]) for values in columns)]
            )
        writer.writerow([name, "mean", "", *map(_number, means)])
    return file.getvalue()


def spreadsheet_text(value: Any) -> Any:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe; return other values unchanged."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _number(value: float | None) -> str:
    """Format a number with all its digits; undefined ones are empty."""
    return "" if value is None or math.isnan(value) else repr(float(value))
