"""Record results in configs/results, and write the tables of configs/RESULTS.md from them.

    python -m tests.harness.results --table=modalities --row='1 | `uniad` | rgb = runs/a,runs/b'
    python -m tests.harness.results --table=modalities --row='1 | `uniad` | rgb += runs/c'
    python -m tests.harness.results --table=robustness --printed=FILE

A row has labels, one for each heading of the table, and the workdirs of runs that differ in their seeds only; of
several, the table has means and standard deviations; of one, 95 % intervals in the columns for which it asks.
With += they are further seeds of a recorded row.
`runs/a:gaussian` takes a baseline of the run. Rows are sorted by their labels. A column such as "AUPRO of dents" is the
mean over the objects that have this kind of defect.

A table with a command has the cells of a Markdown table: written by hand from what the command reports, or with
--printed as the command printed it into a file. Then the day is that of the file, and the versions are those of this
process.

Without --row and --printed, the tables are written as they are recorded. Each table of RESULTS.md follows a line
<!-- results NAME -->.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate

from iumad_jax import cli
from iumad_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
TABLE = re.compile(r"<!-- results (\w+) -->\n(?:\|.*\n)*(?:\n\*Measured [^*]*\*\n)?")
_COLUMNS = {  # heading of a column: metric and figure of results.json
    "I-AUROC": ("i_auroc", "final"),
    "P-AUROC": ("p_auroc", "final"),
    "AUPRO": ("aupro", "final"),
    "object P-AUROC": ("p_auroc_object", "final"),
    "object AUPRO": ("aupro_object", "final"),
    "`fm` I-AUROC": ("i_auroc", "fm"),
    "`fm` AUPRO": ("aupro", "fm"),
    "`fm` object P-AUROC": ("p_auroc_object", "fm"),
    "`new` I-AUROC": ("i_auroc", "new"),
    "`new` AUPRO": ("aupro", "new"),
}


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _write)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("table", None, "Name of the table that gets the rows.", flag_values=values)
    flags.DEFINE_multi_string(
        "row", [], "'LABEL | LABEL = RUN,RUN': a row, new or in place of one; += adds seeds to one.", flag_values=values
    )
    flags.DEFINE_string("printed", None, "File with the table that the table's command printed.", flag_values=values)


def _write(values: flags.FlagValues) -> str:
    if values.row or values.printed:
        file = CONFIGS / "results" / f"{values.table}.json"
        if not file.is_file():
            raise UserError(f"--table={values.table}: {file} does not exist; write its headings and columns first.")
        record = json.loads(file.read_text())
        if values.row if "command" in record else values.printed:
            raise UserError(f"--table={values.table}: with a command in {file}, give --printed; without one, --row.")
        record = _printed(Path(values.printed), record) if values.printed else _with_rows(values.row, record)
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in record["rows"])
        head = json.dumps({key: value for key, value in record.items() if key != "rows"}, ensure_ascii=False)
        file.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    page = CONFIGS / "RESULTS.md"
    page.write_text(filled(page.read_text()))
    return f"{page} is written."


def _printed(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the table that its command printed into a file."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    except (OSError, ValueError) as error:
        raise UserError(f"--printed={file} cannot be read ({error}); name the file with the output.") from error
    tables = sum(not line.strip("|:- ") and "-" in line for line in lines)
    if tables != 1:
        raise UserError(f"--printed={file} has {tables} tables in Markdown; leave one.")
    headings, _, *rows = ([cell.strip() for cell in line.strip().removesuffix("|")[1:].split("|")] for line in lines)
    measured = _origin([file], platform.python_version(), metadata.version("jax"))
    return record | {"measured": measured, "headings": headings, "rows": rows}


def _with_rows(texts: list[str], record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the rows that values of --row describe, sorted."""
    rows = {tuple(row["labels"]): row for row in record["rows"]}
    for text in texts:
        row = _measured(text, record)
        labels = tuple(row["labels"])
        rows[labels] = _further_seeds(text, rows.get(labels), row) if _adds(text) else row
    return record | {"rows": sorted(rows.values(), key=lambda row: row["labels"])}


def _adds(text: str) -> bool:
    return text.rpartition("=")[0].endswith("+")


def _further_seeds(text: str, recorded: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded row with the values of further seeds."""
    if recorded is None or "seeds" not in recorded:
        raise UserError(f"--row={text}: no such row is recorded with its seeds; write = in place of +=.")
    if again := set(recorded["seeds"]) & set(row["seeds"]):
        raise UserError(f"--row={text}: seed {min(again)} is recorded already; name runs with other seeds.")
    measured = dict.fromkeys([*recorded["measured"].split("; "), row["measured"]])
    return recorded | {
        "measured": "; ".join(measured),
        "seeds": recorded["seeds"] + row["seeds"],
        "values": {column: values + row["values"][column] for column, values in recorded["values"].items()},
        "intervals": {},
    }


def _origin(files: Sequence[Path], python: str, jax: str) -> str:
    day = max(datetime.fromtimestamp(file.stat().st_mtime, UTC).date() for file in files)
    return f"{day}, {os.cpu_count()} CPU cores, Python {python}, jax {jax}"


def _measured(text: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return the row that a value of --row describes."""
    labels, _, runs = text.rpartition("=")
    finished = []
    for run in runs.strip().split(","):
        workdir, _, baseline = run.partition(":")
        try:
            results = json.loads((Path(workdir) / "results.json").read_text())
            judged = results["baselines"][baseline] if baseline else results
        except (OSError, KeyError) as error:
            raise UserError(f"--row={text}: {run} has no results ({error}); name a finished run.") from error
        file, intervals = Path(workdir) / "results.json", judged.get("intervals")
        kinds = {column: _of_kind(judged, column) for column in record.get("columns", []) if " of " in column}
        finished.append((file, results["config"]["seed"], results["versions"], judged["summary"], intervals, kinds))
    files, seeds, versions, summaries, all_intervals, all_kinds = zip(*finished, strict=True)
    asked = record.get("intervals", []) if len(finished) == 1 else []
    return {
        "labels": [label.strip() for label in labels.removesuffix("+").split("|")],
        "measured": _origin(files, versions[0]["python"], versions[0]["jax"]),
        "seeds": list(seeds),
        "values": {
            heading: [round(summary[metric][figure], 4) for summary in summaries]
            for heading, (metric, figure) in _COLUMNS.items()
            if summaries[0][metric][figure] is not None
        }
        | {column: [round(kinds[column], 4) for kinds in all_kinds] for column in all_kinds[0]},
        "intervals": {
            heading: [round(limit, 4) for limit in all_intervals[0][_COLUMNS[heading][0]]["mean"]] for heading in asked
        },
    }


def _of_kind(judged: dict[str, Any], column: str) -> float:
    """Return a metric of a kind of defect, the mean over the objects that have it."""
    heading, _, kind = column.partition(" of ")
    metric, _ = _COLUMNS[heading]
    return float(np.mean([kinds[kind][metric] for kinds in judged["kinds"].values() if kind in kinds]))


def filled(page: str) -> str:
    """Return the page with every table that follows a line <!-- results NAME --> as it is recorded."""

    def table(match: re.Match[str]) -> str:
        record = json.loads((CONFIGS / "results" / f"{match[1]}.json").read_text())
        measured = [record["measured"]] if "command" in record else [row["measured"] for row in record["rows"]]
        origins = {origin for text in measured for origin in text.split("; ")}
        return f"<!-- results {match[1]} -->\n{_table(record)}\n\n*Measured {'; '.join(sorted(origins))}.*\n"

    return TABLE.sub(table, page)


def _table(record: dict[str, Any]) -> str:
    columns = record.get("columns", [])
    rows = record["rows"]
    if "command" not in record:
        rows = [
            [*row["labels"], *(_cell(row["values"].get(c, [])) + _interval(row, c) for c in columns)] for row in rows
        ]
    lines = tabulate(rows, [*record["headings"], *columns], "github", disable_numparse=True).splitlines()
    return "\n".join(re.sub(r" +\|", " |", re.sub("-{3,}", "---", line)) for line in lines)


def _cell(values: list[float] | str) -> str:
    """Format a row's values, or what was recorded as text."""
    if isinstance(values, str) or not values:
        return values or "not measured"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _interval(row: dict[str, Any], column: str) -> str:
    """Format the 95 % interval of a row's value, if it is recorded."""
    limits = row.get("intervals", {}).get(column)
    return f" [{limits[0]:.2f}, {limits[1]:.2f}]" if limits else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv))
