"""Writes the benchmarks' results as tables in Markdown: python -m kernels.benchmarks.tables FILE.json..."""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

Rates = dict[str, float | None]


def floor(row: dict[str, Any], rates: Rates) -> float | None:
    """Seconds below which no scan can be on a device of these rates, None where they are not known.

    Its arrays go once through memory, and its exponentials through the special-function units, at the same time.
    Forward reads x and delta and writes y: 3 arrays, and states + 4 special functions an element; backward reads x,
    delta and y's gradient and writes those of x and delta, and computes the exponentials twice.
    """
    bandwidth, functions = rates["bytes_per_second"], rates["special_functions_per_second"]
    if not bandwidth or not functions:
        return None
    batch, length, channels, states, _ = row["shape"]
    elements, size = batch * length * channels, 2 if row["dtype"].endswith("16") else 4
    forward = max(3 * size * elements / bandwidth, (states + 4) * elements / functions)
    backward = max(5 * size * elements / bandwidth, (2 * states + 4) * elements / functions)
    return forward + backward if "backward" in row["pass"] else forward


def of_scans(rows: list[dict[str, Any]], rates: Rates) -> str:
    """Medians in ms, in brackets the ratio to xla's, temporary memory, and shares of the floor where it is known."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    known = any("seconds" in row and floor(row, rates) for row in rows)
    together = " / ".join(f"`{name}`" for name in names)
    header = ["batch x length x channels x states x groups", "pass", *(f"`{name}` ms" for name in names)]
    header += [f"temporary MiB: {together}", *([f"share of the floor: {together}"] if known else [])]
    lines = []
    for shape, of_pass in dict.fromkeys((tuple(row["shape"]), row["pass"]) for row in rows):
        by_name = {row["name"]: row for row in rows if (tuple(row["shape"]), row["pass"]) == (shape, of_pass)}
        medians = {name: statistics.median(row["seconds"]) for name, row in by_name.items() if "seconds" in row}
        times, memory, shares = [], [], []
        for name in names:
            row = by_name.get(name, {"left_out": "not measured"})
            compared = name != "xla" and {name, "xla"} <= set(medians)
            ratio = f" ({medians[name] / medians['xla']:.1f}x)" if compared else ""
            times.append(f"{1e3 * medians[name]:.3g}{ratio}" if name in medians else row["left_out"])
            size, least = row.get("temporary_bytes"), floor(row, rates) if name in medians else None
            memory.append("?" if size is None else f"{size / 2**20:.0f}")
            shares.append(f"{least / medians[name]:.0%}" if least else "?")
        cells = [" x ".join(map(str, shape)), of_pass, *times, " / ".join(memory)]
        lines.append([*cells, " / ".join(shares)] if known else cells)
    return _markdown(header, lines)


def of_part(rows: dict[str, dict[str, Any]]) -> str:
    """A part of the GPU command: its rows as they are, then what is a table within a row."""
    names = dict.fromkeys(name for row in rows.values() for name, value in row.items() if _fits(value))
    names.pop("machine", None)
    lines = [[key, *(_told(row.get(name)) for name in names)] for key, row in rows.items()]
    found = [_markdown(["", *names], lines)]
    for key, row in rows.items():
        for name, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(value[0])
                inner = _markdown(columns, [[_told(one.get(column)) for column in columns] for one in value])
                found.append(f"{key}, {name}:\n\n{inner}")
            elif isinstance(value, str) and "\n" in value:
                found.append(f"{key}, {name}:\n\n{value}")
    return "\n\n".join(found)


def of_file(content: dict[str, Any]) -> str:
    """The tables of one file of results."""
    rows = content["rows"]
    if content["part"] != "scan":
        return of_part(rows)
    if isinstance(rows, list):
        return of_scans(rows, content["rates"])
    failed = {key: row for key, row in rows.items() if "timed" not in row}
    timed = [one for row in rows.values() for one in row.get("timed", [])]
    tables = [of_scans(timed, rows["rates"])] if timed and "rates" in rows else []
    return "\n\n".join([*tables, *([of_part(failed)] if failed else [])])


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables of every file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results of a benchmark")
    for file in parser.parse_args(arguments).files:
        try:
            content = json.loads(file.read_text())
            table = of_file(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{file} holds no results of a benchmark ({error!r}); give one that does.", file=sys.stderr)
            return 2
        machines = "; ".join(map(_machine, content.get("machines", [content])))
        print(f"{file.stem} ({machines}):\n\n{table}\n")
    return 0


def _machine(described: dict[str, Any]) -> str:
    driver = f", driver {described['driver']}" if described["driver"] else ""
    versions = ", ".join(map(" ".join, described["versions"].items()))
    return f"{described['date']}, {described['device']}{driver}, {versions}"


def _fits(value: Any) -> bool:
    return not isinstance(value, list | dict) and "\n" not in str(value)


def _told(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    sys.exit(main())
