"""Print results of the benchmarks as Markdown tables.

    python -m kernels.benchmarks.tables kernels/benchmarks/results/cpu_py312.json

Each table is preceded by the date, device, driver and package versions of its measurement.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from kernels.benchmarks import command_line

Rates = dict[str, float | None]


def floor(row: dict[str, Any], rates: Rates) -> float | None:
    """Compute a lower bound of the time of a scan on a device with these rates, in seconds; None if they are unknown.

    The arrays pass through memory once and the exponentials through the special-function units, in parallel. The
    forward pass reads x and delta and writes y: 3 arrays, with states + 4 special functions per element. The backward
    pass reads x, delta and the gradient of y, writes the gradients of x and delta (5 arrays), and computes the
    exponentials twice.
    """
    bandwidth, functions = rates["bytes_per_second"], rates["special_functions_per_second"]
    if not bandwidth or not functions:
        return None
    batch, length, channels, states, _ = row["shape"]
    elements, size = batch * length * channels, 2 if row["dtype"].endswith("16") else 4
    forward = max(3 * size * elements / bandwidth, (states + 4) * elements / functions)
    backward = max(5 * size * elements / bandwidth, (2 * states + 4) * elements / functions)
    return forward + backward if "backward" in row["pass"] else forward


def scan_table(rows: list[dict[str, Any]], rates: Rates) -> str:
    """Format medians in ms (in brackets the ratio to "xla"), temporary memory and, if known, the share of the floor."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    has_floor = any("seconds" in row and floor(row, rates) for row in rows)
    all_names = " / ".join(f"`{name}`" for name in names)
    header = ["batch x length x channels x states x groups", "pass", *(f"`{name}` ms" for name in names)]
    header += [f"temporary MiB: {all_names}", *([f"share of the floor: {all_names}"] if has_floor else [])]
    lines = []
    for shape, pass_name in dict.fromkeys((tuple(row["shape"]), row["pass"]) for row in rows):
        by_name = {row["name"]: row for row in rows if (tuple(row["shape"]), row["pass"]) == (shape, pass_name)}
        medians = {name: statistics.median(row["seconds"]) for name, row in by_name.items() if "seconds" in row}
        times, memory, shares = [], [], []
        for name in names:
            row = by_name.get(name, {"left_out": "not measured"})
            is_comparable = name != "xla" and {name, "xla"} <= set(medians)
            ratio = f" ({medians[name] / medians['xla']:.1f}x)" if is_comparable else ""
            times.append(f"{1e3 * medians[name]:.3g}{ratio}" if name in medians else row["left_out"])
            size, lower_bound = row.get("temporary_bytes"), floor(row, rates) if name in medians else None
            memory.append("?" if size is None else f"{size / 2**20:.0f}")
            shares.append(f"{lower_bound / medians[name]:.0%}" if lower_bound else "?")
        cells = [" x ".join(map(str, shape)), pass_name, *times, " / ".join(memory)]
        lines.append([*cells, " / ".join(shares)] if has_floor else cells)
    return _markdown(header, lines)


def part_table(rows: dict[str, dict[str, Any]]) -> str:
    """Format the results of a part of the GPU command: a table of its rows, then the tables within rows."""
    names = dict.fromkeys(name for row in rows.values() for name, value in row.items() if _fits_in_cell(value))
    names.pop("machine", None)
    lines = [[key, *(_cell(row.get(name)) for name in names)] for key, row in rows.items()]
    tables = [_markdown(["", *names], lines)]
    for key, row in rows.items():
        for name, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(value[0])
                inner = _markdown(columns, [[_cell(item.get(column)) for column in columns] for item in value])
                tables.append(f"{key}, {name}:\n\n{inner}")
            elif isinstance(value, str) and "\n" in value:
                tables.append(f"{key}, {name}:\n\n{value}")
    return "\n\n".join(tables)


def file_tables(content: dict[str, Any]) -> str:
    """Format the results of one file."""
    rows = content["rows"]
    if content["part"] != "scan":
        return part_table(rows)
    if isinstance(rows, list):
        return scan_table(rows, content["rates"])
    failed = {key: row for key, row in rows.items() if "timed" not in row}
    timed = [timed_row for row in rows.values() for timed_row in row.get("timed", [])]
    tables = [scan_table(timed, rows["rates"])] if timed and "rates" in rows else []
    return "\n\n".join([*tables, *([part_table(failed)] if failed else [])])


def machine_text(machine: dict[str, Any]) -> str:
    """Format the result of `machine.describe`."""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    versions = ", ".join(map(" ".join, machine["versions"].items()))
    return f"{machine['date']}, {machine['device']}{driver}, {versions}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSON file of results that a benchmark wrote with --json or --out.",
    )
    for file in parser.parse_args(arguments).files:
        try:
            content = json.loads(file.read_text())
            table = file_tables(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(
                f"{file} contains no benchmark results ({error!r}); choose a file that a benchmark has written.",
                file=sys.stderr,
            )
            return 2
        machines = "; ".join(map(machine_text, content.get("machines", [content])))
        print(f"{file.stem} ({machines}):\n\n{table}\n")
    return 0


def _fits_in_cell(value: Any) -> bool:
    return not isinstance(value, list | dict) and "\n" not in str(value)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    sys.exit(main())
