"""Tables of configs/RESULTS.md are those that are recorded, and rows are recorded from finished runs."""

import json
import os
import platform
import re

import jax
import pytest

from tests.harness import results

PAGE = (results.CONFIGS / "RESULTS.md").read_text()
RECORDS = {file.stem: json.loads(file.read_text()) for file in (results.CONFIGS / "results").glob("*.json")}


def test_the_page_has_the_recorded_tables_and_no_others():
    assert sorted(results.TABLE.findall(PAGE)) == sorted(RECORDS)
    assert results.filled(PAGE) == PAGE
    assert not re.findall(r"^\|.*", results.TABLE.sub("", PAGE), re.M)


def test_recorded_commands_stand_on_the_page():
    page = re.sub(r"\\\n\s*", "", PAGE)
    assert [name for name, record in RECORDS.items() if record.get("command", "") not in page] == []


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Make a page with one table, of one row, and replace the project's."""
    monkeypatch.setattr(results, "CONFIGS", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    row = {"labels": ["old", "rgb"], "measured": "2025-12-31, a machine", "values": {"AUPRO": [0.5]}}
    record = {"headings": ["method", "modality"], "columns": ["AUPRO", "`fm` AUPRO"], "rows": [row]}
    (tmp_path / "results" / "some.json").write_text(json.dumps(record))
    (tmp_path / "RESULTS.md").write_text("Before.\n\n<!-- results some -->\n| a |\n|---|\n\nAfter.\n")
    return tmp_path


def finish_run(folder, aupro, baseline, seed=0):
    """Write the results of a run in which nothing but AUPRO is defined."""

    def summary(value):
        undefined = dict.fromkeys(("final", "fm", "new"))
        metrics = dict.fromkeys(("i_auroc", "p_auroc", "p_auroc_object", "aupro_object"), undefined)
        return metrics | {"aupro": {"final": value, "fm": -0.01, "new": None}}

    folder.mkdir()
    versions = {"python": "3.11.0", "jax": "0.10.2"}
    content = {"summary": summary(aupro), "baselines": {"bank": {"summary": summary(baseline)}}, "versions": versions}
    content |= {"config": {"seed": seed}}
    (folder / "results.json").write_text(json.dumps(content))
    os.utime(folder / "results.json", (1767225600, 1767225600))  # 2026-01-01


def test_rows_are_recorded_from_runs(configs, monkeypatch):
    """The mean of 0.6 and 0.8 is 0.7, and their standard deviation 0.1 times the root of 2."""
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    finish_run(configs / "a", 0.6, 0.4)
    finish_run(configs / "b", 0.8, 0.4, seed=1)
    rows = ["--row=old | rgb = a:bank", "--row=new=ish | depth = a,b"]
    assert results.main(["results", "--table=some", *rows]) == 0
    assert (configs / "RESULTS.md").read_text().splitlines() == [
        "Before.",
        "",
        "<!-- results some -->",
        "| method | modality | AUPRO | `fm` AUPRO |",
        "|---|---|---|---|",
        "| new=ish | depth | 0.700 ± 0.141 | -0.010 ± 0.000 |",
        "| old | rgb | 0.400 | -0.010 |",
        "",
        "*Measured 2026-01-01, 3 CPU cores, Python 3.11.0, jax 0.10.2.*",
        "",
        "After.",
    ]
    assert results.main(["results"]) == 0  # again, from what is recorded
    assert (configs / "RESULTS.md").read_text().count("0.700 ± 0.141") == 1


def test_seeds_are_added_to_a_recorded_row(configs, capsys):
    """The mean of 0.6, 0.8 and 0.7 is 0.7, and their standard deviation 0.1."""
    for name, aupro, seed in (("a", 0.6, 0), ("b", 0.8, 1), ("c", 0.7, 2)):
        finish_run(configs / name, aupro, 0.4, seed)
    os.utime(configs / "c" / "results.json", (1767312000, 1767312000))  # 2026-01-02
    assert results.main(["results", "--table=some", "--row=a += | rgb = a,b"]) == 0
    assert results.main(["results", "--table=some", "--row=a += | rgb += c"]) == 0
    page = (configs / "RESULTS.md").read_text()
    assert "| a += | rgb | 0.700 ± 0.100 | -0.010 ± 0.000 |" in page
    assert "2026-01-01" in page
    assert "2026-01-02" in page
    for runs in ("a += | rgb += b", "a += | depth += c", "old | rgb += c"):
        assert results.main(["results", "--table=some", f"--row={runs}"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (configs / "RESULTS.md").read_text() == page


def test_a_table_may_have_columns_of_kinds_of_defects(configs):
    record = json.loads((configs / "results" / "some.json").read_text())
    (configs / "results" / "some.json").write_text(
        json.dumps(record | {"columns": ["AUPRO of dents", "AUPRO of bumps"]})
    )
    finish_run(configs / "a", 0.6, 0.4)
    content = json.loads((configs / "a" / "results.json").read_text())
    bumps, dents = {"aupro": 0.9}, {"aupro": 0.5}
    content["kinds"] = {"ant": {"bumps": bumps, "dents": dents}, "bee": {"dents": {"aupro": 0.7}}}
    (configs / "a" / "results.json").write_text(json.dumps(content))
    assert results.main(["results", "--table=some", "--row=one | rgb = a"]) == 0
    assert "| one | rgb | 0.600 | 0.900 |" in (configs / "RESULTS.md").read_text()


def test_a_table_may_ask_for_intervals_of_single_runs(configs):
    record = json.loads((configs / "results" / "some.json").read_text())
    (configs / "results" / "some.json").write_text(json.dumps(record | {"intervals": ["AUPRO"]}))
    for name in ("a", "b"):
        finish_run(configs / name, 0.6, 0.4)
        content = json.loads((configs / name / "results.json").read_text())
        content["intervals"] = {"aupro": {"mean": [0.512, 0.678]}}
        (configs / name / "results.json").write_text(json.dumps(content))
    results.main(["results", "--table=some", "--row=one | rgb = a", "--row=two | rgb = a,b"])
    page = (configs / "RESULTS.md").read_text()
    assert "| one | rgb | 0.600 [0.51, 0.68] | -0.010 |" in page
    assert "| two | rgb | 0.600 ± 0.000 | -0.010 ± 0.000 |" in page


PRINTED = "Two columns:\n\n| of | ms |\n|:---|-----:|\n| all |  3.50 |\n| | n. a. |\n"


def test_a_table_is_recorded_as_its_command_printed_it(configs, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    file = configs / "results" / "some.json"
    file.write_text(json.dumps({"command": "time", "measured": "", "headings": ["old"], "rows": [["é"]]}))
    (configs / "printed").write_text(PRINTED)
    os.utime(configs / "printed", (1767225600, 1767225600))  # 2026-01-01
    assert results.main(["results", "--table=some", "--printed=printed"]) == 0
    assert (configs / "RESULTS.md").read_text().splitlines()[2:] == [
        "<!-- results some -->",
        "| of | ms |",
        "|---|---|",
        "| all | 3.50 |",
        "| | n. a. |",
        "",
        f"*Measured 2026-01-01, 3 CPU cores, Python {platform.python_version()}, jax {jax.__version__}.*",
        "",
        "After.",
    ]
    assert json.loads(file.read_text())["command"] == "time"


def test_missing_runs_and_tables_are_reported(configs, capsys):
    finish_run(configs / "a", 0.6, 0.4)
    (configs / "printed").write_text(PRINTED)
    (configs / "two").write_text(PRINTED + PRINTED)
    record = {"command": "time", "measured": "", "headings": ["old"], "rows": []}
    (configs / "results" / "printed.json").write_text(json.dumps(record))
    before = (configs / "RESULTS.md").read_text()
    for flags in (
        ["--table=some", "--row=x | y = b"],
        ["--table=some", "--row=x | y = a:c"],
        ["--row=x | y = a"],
        ["--table=some", "--printed=printed"],
        ["--table=printed", "--row=x | y = a"],
        ["--table=printed", "--printed=two"],
        ["--table=printed", "--printed=absent"],
        ["--table=printed", "--printed=results/some.json"],
    ):
        assert results.main(["results", *flags]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (configs / "RESULTS.md").read_text() == before
