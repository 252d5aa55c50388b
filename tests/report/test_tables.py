"""Tables of results that are written by hand, compared cell by cell."""

import copy
import csv
import io
import json
import math
import re
import shutil
import subprocess

import pytest

from iumad_jax.errors import UserError
from iumad_jax.report import latex, result_files, tables
from iumad_jax.runtime.storage import as_json
from tests import sentences

nan = math.nan

# The columns have the order of the dataset; the protocol learns zebra and ant first, then cat.
OBJECTS = ["ant", "cat", "zebra"]
STEPS = [["zebra", "ant"], ["cat"]]
MATRIX = {
    "i_auroc": [[0.9, nan, 0.8], [0.85, 0.6, 0.7]],
    "p_auroc": [[0.9, nan, nan], [0.96, 0.6, nan]],
    "aupro": [[0.5, nan, 0.7], [0.4, 0.3, 0.6]],
    "aupro_exact": [[0.51, nan, 0.71], [0.41, 0.31, 0.61]],
    "p_auroc_object": [[nan] * 3] * 2,
    "aupro_object": [[nan] * 3] * 2,
}
BASELINE = {metric: [[0.65, nan, 0.65], [0.65] * 3] for metric in ("i_auroc", "p_auroc", "aupro", "aupro_exact")} | {
    "p_auroc_object": [[nan] * 3] * 2,
    "aupro_object": [[nan] * 3] * 2,
}
NO_INTERVALS = {metric: {"objects": [[nan, nan]] * 3, "mean": [nan, nan]} for metric in MATRIX}
INTERVALS = NO_INTERVALS | {  # the cat has a single good image
    "i_auroc": {"objects": [[0.7, 0.948], [nan, nan], [0.5, 0.8]], "mean": [0.6, 0.81]},
    "aupro": {"objects": [[0.3, 0.5], [nan, nan], [0.4, 0.8]], "mean": [0.333, 0.533]},
}


def run(matrix=MATRIX, steps=STEPS, **others):
    return {
        "config": {"method": "ib_iumad", "dataset": {"name": "zoo"}, "modality": "rgb+depth"},
        "protocol": "2-1",
        "objects": OBJECTS,
        "steps": steps,
        "matrix": matrix,
        "summary": tables.summarise(matrix),
        "intervals": NO_INTERVALS,
        "seconds": 1.5,
        "versions": {"jax": "0.11"},
        **others,
    }


def baseline(**others):
    return {"matrix": BASELINE, "summary": tables.summarise(BASELINE), "intervals": NO_INTERVALS, **others}


def run_with_baseline(**others):
    return run(baselines={"feature_norm": baseline()}, **others)


def cells(text, *start):
    """Return the other cells of all table rows that begin with the given cells."""
    rows = [re.split(r"\s*\|\s*|\s{2,}", line.strip().strip("|").strip()) for line in text.splitlines()]
    return [row[len(start) :] for row in rows if tuple(row[: len(start)]) == start]


@pytest.fixture
def console(tmp_path):
    return lambda results: tables.console(results, tmp_path)


def test_summary_figures():
    assert tables.summarise({"aupro": MATRIX["aupro"]}) == {
        "aupro": pytest.approx(
            {
                "final": (0.4 + 0.3 + 0.6) / 3,
                "acc": (0.6 + (0.4 + 0.3 + 0.6) / 3) / 2,
                "fm": (0.1 + 0.1) / 2,
                "fm_aggregate": 0.6 - (0.4 + 0.3 + 0.6) / 3,
                "new": (0.5 + 0.7 + 0.3) / 3,
            }
        )
    }


def test_objects_are_in_the_order_of_learning(console):
    text = console(run())
    lines = text.splitlines()
    assert lines[0] == tables.title(run())
    header, rule, *rows = lines[[line.split("  ")[0] for line in lines].index("object") :][:6]
    assert re.split(r"\s{2,}", header) == [
        "object",
        "step",
        "I-AUROC",
        "P-AUROC",
        "AUPRO",
    ]  # metrics that are undefined everywhere have no column
    assert set(rule) == {"-", " "}
    assert [re.split(r"\s{2,}", row) for row in rows] == [
        ["zebra", "0", "0.700", "-", "0.600"],
        ["ant", "0", "0.850", "0.960", "0.400"],
        ["cat", "1", "0.600", "0.600", "0.300"],
        ["mean", "0.717", "0.780", "0.433"],
    ]


def test_undefined_cells_are_counted_with_their_reason(console):
    text = console(run())
    (line,) = [line for line in text.splitlines() if line.startswith(sentences.UNDEFINED)]
    assert re.search(sentences.UNDEFINED_WITHOUT_DEFECT.format(count=1, metric="P-AUROC"), line)
    assert re.search(sentences.UNDEFINED_WITHOUT_DEPTH.format(count=3, metric="object P-AUROC"), line)
    assert re.search(sentences.UNDEFINED_WITHOUT_DEPTH.format(count=3, metric="object AUPRO"), line)
    assert line.count("(no depth") == 1  # metrics with the same reason share a sentence
    assert "I-AUROC" not in line
    defined = {
        metric: [[0.9, nan, 0.9], [0.9] * 3] for metric in MATRIX
    }  # cells before learning do not count as undefined
    assert sentences.UNDEFINED not in console(run(defined))


def test_without_test_images_metrics_have_no_table(console):
    matrix = {metric: [[nan] * 3] * 2 for metric in MATRIX}
    baselines = {"feature_norm": {"matrix": matrix, "summary": tables.summarise(matrix), "intervals": NO_INTERVALS}}
    results = run(
        matrix, baselines=baselines, decisions=[{"objects": {name: decisions_of_object() for name in OBJECTS}}]
    )
    for text in (console(results), tables.markdown(results)):
        assert sentences.NOTHING_MEASURED in text
        assert cells(text, "zebra")[0] == ["0", "7", "12.5%"]
        assert "report.html" not in text  # which has no pictures
        assert not any(word in text for word in ("AUROC", "AUPRO", "mean", sentences.UNDEFINED))
        assert not any("-" in row for name in OBJECTS for row in cells(text, name))


def decisions_of_object(bound=0.125, **test):
    """Return the thresholds of an object and error rates on its test images."""
    image = {"threshold": 2.0, "interval": [1.5, 2.0], "images": 7, "false_alarm_bound": bound}
    return {"image": image, "pixel": image} | ({"test": test} if test else {})


def test_decisions_come_before_metrics(console):
    """Error rates by object in the order of learning, with their means; undefined rates have no column."""
    rates = {"false_alarms": [0.25, 0.0, nan], "misses": [nan] * 3, "recognised": [1.0, 0.5, 1.0]}
    test = {name: {rate: values[i] for rate, values in rates.items()} for i, name in enumerate(OBJECTS)}
    objects = {name: decisions_of_object(None if name == "cat" else 0.125, **test[name]) for name in OBJECTS}
    text = console(run(decisions=[{"objects": {}}, {"objects": objects}]))
    header = ["step", "calibration images", "false-alarm bound", "false alarms", "recognised"]
    assert cells(text, "object")[0] == header
    assert [cells(text, name)[0] for name in ("zebra", "ant", "cat")] == [
        ["0", "7", "12.5%", "-", "100.0%"],
        ["0", "7", "12.5%", "25.0%", "100.0%"],
        ["1", "7", "none", "0.0%", "50.0%"],
    ]
    assert cells(text, "mean")[0] == ["12.5%", "83.3%"]
    assert text.index("false alarms") < text.index("report.html") < text.index("I-AUROC")
    assert sentences.NO_BOUND in text
    objects["cat"] = decisions_of_object(**test["cat"])
    assert sentences.NO_BOUND not in console(run(decisions=[{"objects": {}}, {"objects": objects}]))


def test_figures_of_learning_and_forgetting(console):
    text = console(run())
    assert cells(text, "metric", "method") == [["final", "acc", "fm", "fm_aggregate", "new"]]
    assert cells(text, "I-AUROC", "ib_iumad") == [["0.717", "0.783", "0.075", "0.133", "0.767"]]
    assert cells(text, "AUPRO", "ib_iumad") == [["0.433", "0.517", "0.100", "0.167", "0.500"]]
    assert cells(text, "P-AUROC", "ib_iumad") == []  # the console shows the main metrics, results.md all
    text = tables.markdown(run())
    assert cells(text, "I-AUROC", "ib_iumad") == [["0.717", "0.783", "0.075", "0.133", "0.767"]]
    assert cells(text, "P-AUROC", "ib_iumad") == [["0.780", "0.840", "-0.060", "0.120", "0.750"]]
    assert cells(text, "AUPRO exact", "ib_iumad") == [["0.443", "0.527", "0.100", "0.167", "0.510"]]
    assert cells(text, "object AUPRO", "ib_iumad") == []


def test_a_single_step_has_nothing_to_forget(console):
    matrix = {metric: [[0.9, 0.8, 0.7]] for metric in MATRIX}
    text = console(run(matrix, [OBJECTS]))
    assert cells(text, "mean") == [["0.800", "0.800", "0.800", "0.800", "0.800"]]
    assert "fm" not in text
    assert sentences.SINGLE_STEP in text
    assert sentences.SINGLE_STEP not in console(run())
    evaluated = {"workdir": "runs/zoo", "step": 1, "learned": 3}  # by then the run may well have forgotten
    text = console(run(matrix, [OBJECTS], evaluated=evaluated))
    assert sentences.SINGLE_STEP not in text
    assert sentences.FORGETTING_IN_RUN.format("runs/zoo/results.md") in text


def test_a_partial_run_shows_its_learned_objects(console):
    matrix = {metric: rows[:1] for metric, rows in MATRIX.items()}
    text = console(run(matrix))
    assert cells(text, "zebra", "0")[0][0] == "0.800"
    assert "cat" not in text


def test_baselines_are_in_every_table(console):
    text = console(run(baselines={"feature_norm": baseline(bytes=2_000_000)}, bytes=12_345_678))
    assert cells(text, "mean")[0] == ["0.717", "0.780", "0.433"]
    assert cells(text, "mean of feature_norm") == [["0.650", "0.650", "0.650"]]
    assert cells(text, "AUPRO", "feature_norm") == [["0.650", "0.650", "0.000", "0.000", "0.650"]]
    start = sentences.NO_BETTER_THAN_BASELINE.format("feature_norm")
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    assert line == f"{start} in AUPRO (0.433 against 0.650)."  # the method is better in the other metrics
    assert sentences.STORED.format("ib_iumad 12.3 MB, feature_norm 2.0 MB") in text
    assert sentences.NO_BETTER_THAN_BASELINE.format("") not in console(run())


def test_intervals_of_objects_and_means(console):
    """results.md has them beside the values, the console below the means only, as wide lines would break."""
    results = run(intervals=INTERVALS, baselines={"feature_norm": baseline(intervals=INTERVALS)})
    text = tables.markdown(results)
    assert cells(text, "zebra")[0] == ["0", "0.700 [0.50, 0.80]", "-", "0.600 [0.40, 0.80]"]
    assert cells(text, "ant")[0] == ["0", "0.850 [0.70, 0.95]", "0.960", "0.400 [0.30, 0.50]"]
    assert cells(text, "cat")[0] == ["1", "0.600", "0.600", "0.300"]  # undefined
    assert cells(text, "mean")[0] == ["", "0.717 [0.60, 0.81]", "0.780", "0.433 [0.33, 0.53]"]
    assert cells(text, "mean of feature_norm")[0][1] == "0.650 [0.60, 0.81]"
    assert sentences.INTERVALS in text
    text = console(results)
    assert cells(text, "zebra")[0] == ["0", "0.700", "-", "0.600"]
    lines = text.splitlines()
    for start in ("mean  ", "mean of feature_norm  "):
        (row,) = [index for index, line in enumerate(lines) if line.startswith(start)]
        assert re.split(r"\s{2,}", lines[row + 1].strip()) == ["[0.60, 0.81]", "[0.33, 0.53]"]
    assert sentences.INTERVALS in text


def test_bytes_that_the_strategy_stores_per_object(console):
    def line_about(strategy):
        config = run()["config"] | {"continual": {"strategy": strategy}}
        text = console(run(config=config, strategy_bytes=6_000))
        (line,) = [line for line in text.splitlines() if line.startswith(sentences.STRATEGY)]
        return line

    assert line_about("replay") == sentences.STRATEGY_STORES.format(strategy="replay", size="2.0 kB")
    assert line_about("isvd") == sentences.STRATEGY_STORES_IN_ALL.format(strategy="isvd", size="6.0 kB")
    assert line_about("joint").startswith(sentences.STRATEGY_JOINT)
    assert sentences.STRATEGY_JOINT_STORES.format("2.0 kB") in line_about("joint")
    assert f"\n{sentences.STRATEGY}" not in console(run())


def test_the_console_ends_with_the_folder_of_the_results(console, tmp_path):
    assert console(run()).endswith(sentences.RESULTS_ARE_IN.format(tmp_path))


def test_markdown_holds_every_matrix():
    text = tables.markdown(run_with_baseline())
    title = sentences.TITLE_OF_PROTOCOL.format(method="ib_iumad", dataset="zoo", modality="rgb+depth", protocol="2-1")
    assert text.startswith(f"# {title}\n")
    parts = dict(part.split(f"{sentences.AFTER_EVERY_STEP}\n", 1) for part in text.split("## ")[1:])
    assert list(parts) == ["I-AUROC", "P-AUROC", "AUPRO", "AUPRO exact"]
    assert cells(parts["I-AUROC"], "method", sentences.AFTER_STEP) == [["zebra", "ant", "cat", "mean"]]
    assert cells(parts["I-AUROC"], "ib_iumad") == [
        ["0", "0.800", "0.900", "", "0.850"],  # cat is not yet learned: an empty cell
        ["1", "0.700", "0.850", "0.600", "0.717"],
    ]
    assert cells(parts["P-AUROC"], "ib_iumad", "0") == [["-", "0.900", "", "0.900"]]
    assert cells(parts["AUPRO"], "feature_norm", "1") == [["0.650"] * 4]


def test_an_evaluation_tells_when_objects_were_learned(console):
    evaluated = {"workdir": "run", "step": 3, "learned": 4, "steps": {"zebra": 0, "ant": 2, "cat": 3}}
    once = run({metric: rows[1:] for metric, rows in MATRIX.items()}, [["zebra", "ant", "cat"]], evaluated=evaluated)
    assert [cells(console(once), name)[0][0] for name in ("zebra", "ant", "cat")] == ["0", "2", "3"]
    rows = list(csv.reader(io.StringIO(result_files.comma_separated(once))))
    assert [row[2] for row in rows[1:]] == ["0", "2", "3", ""]


def test_kinds_of_defects_have_a_table_of_their_own():
    def record(images, value, **others):
        return {"images": images, **dict.fromkeys(MATRIX, value), **others}

    of_ant = {"dent": record(4, 0.8, alarms=0.25), "stain": record(2, 0.6, alarms=1.0)}
    kinds = {"ant": of_ant, "zebra": {"dent": record(1, 0.9, alarms=1.0)}}
    of_baseline = {name: {kind: {**r, "aupro": None} for kind, r in found.items()} for name, found in kinds.items()}
    results = run_with_baseline(kinds=kinds)
    results["baselines"]["feature_norm"]["kinds"] = of_baseline
    part = tables.markdown(results).split("## Kinds of defects")[1].split("\n## ")[0]
    assert cells(part, "kind") == [["method", "images", "alarms", "I-AUROC", "P-AUROC", "AUPRO"]]
    assert cells(part, "dent", "ib_iumad") == [["5", "40.0%", "0.850", "0.850", "0.850"]]  # 2 of 5 images, 2 objects
    assert cells(part, "stain", "ib_iumad") == [["2", "100.0%", "0.600", "0.600", "0.600"]]
    assert cells(part, "stain", "feature_norm")[0][2:] == ["0.600", "0.600", "-"]
    one = {name: {"dent": found["dent"]} for name, found in kinds.items()}
    assert "Kinds of defects" not in tables.markdown(run(kinds=one))  # it would repeat the metrics of objects


def test_results_read_back_with_null_for_undefined(tmp_path, console):
    results = run()
    assert result_files.read(tmp_path) is None
    result_files.write(tmp_path, results)
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    loaded = result_files.read(tmp_path)
    assert loaded == json.loads(text)
    assert loaded["matrix"]["p_auroc"] == [[0.9, None, None], [0.96, 0.6, None]]
    assert loaded["summary"]["aupro_object"]["fm"] is None
    assert loaded["summary"]["i_auroc"]["fm"] == results["summary"]["i_auroc"]["fm"]  # to the last bit
    assert {key: loaded[key] for key in ("config", "protocol", "objects", "steps", "seconds", "versions")} == {
        key: results[key] for key in ("config", "protocol", "objects", "steps", "seconds", "versions")
    }
    assert console(loaded) == console(results)
    assert (tmp_path / "results.md").read_text() == tables.markdown(loaded) == tables.markdown(results)
    assert (tmp_path / "results.tex").read_text() == latex.table(loaded) == latex.table(results)
    assert (
        (tmp_path / "results.csv").read_text()
        == result_files.comma_separated(loaded)
        == result_files.comma_separated(results)
    )


def test_results_of_an_older_version_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({key: value for key, value in run().items() if key != "intervals"})
    )
    with pytest.raises(UserError, match=sentences.RESULTS_BY_OLDER_VERSION.format(r"results\.json")):
        result_files.read(tmp_path)


def test_results_with_kinds_of_defects_without_images_are_refused(tmp_path):
    kinds = {"ant": {kind: {"images": 0, "alarms": 0.0, **dict.fromkeys(MATRIX, 0.5)} for kind in ("dent", "stain")}}
    (tmp_path / "results.json").write_text(json.dumps(as_json(run(kinds=kinds))))
    with pytest.raises(UserError, match=r"results\.json cannot be read .*; remove the file"):
        result_files.read(tmp_path)


def test_writing_does_not_modify_the_results(tmp_path):
    results = run()
    before = copy.deepcopy(results)
    result_files.write(tmp_path, results)
    assert repr(results) == repr(before)


def test_results_that_cannot_be_read_or_written_are_reported(tmp_path):
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format(".*results")):
        result_files.write(tmp_path / "nowhere", run())
    (tmp_path / "results.json").write_text('{"config": ')
    with pytest.raises(UserError, match=sentences.FILE_UNREADABLE.format(r"results\.json")):
        result_files.read(tmp_path)


LATEX = r"""% ib_iumad on zoo, rgb+depth, protocol 2-1; FM: the best earlier value minus the last
% in brackets: 95 % bootstrap interval over test images
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
\begin{tabular}{lrrrrrrrr}
\toprule
& \multicolumn{4}{c}{ib\_iumad} & \multicolumn{4}{c}{feature\_norm} \\
\cmidrule(lr){2-5}\cmidrule(lr){6-9}
object & I-AUROC & AUPRO & FM (I) & FM (A) & I-AUROC & AUPRO & FM (I) & FM (A) \\
\midrule
zebra & \textbf{70.0} & 60.0 & 10.0 & 10.0 & 65.0 & \textbf{65.0} & \textbf{0.0} & \textbf{0.0} \\
ant & \textbf{85.0} & 40.0 & 5.0 & 10.0 & 65.0 & \textbf{65.0} & \textbf{0.0} & \textbf{0.0} \\
cat & 60.0 & 30.0 & -- & -- & \textbf{65.0} & \textbf{65.0} & -- & -- \\
\midrule
mean & \textbf{71.7} & 43.3 & 7.5 & 10.0 & 65.0 & \textbf{65.0} & \textbf{0.0} & \textbf{0.0} \\
\bottomrule
\end{tabular}}%
"""


def test_latex_in_the_papers_form():
    assert latex.table(run_with_baseline()) == LATEX
    alone = latex.table(run())  # without a comparison no value is bold
    assert r"zebra & 70.0 & 60.0 & 10.0 & 10.0 \\" in alone.splitlines()


def test_latex_has_intervals_below_the_values():
    lines = latex.table(run(intervals=INTERVALS, baselines={"feature_norm": baseline()})).splitlines()
    (ant,) = [index for index, line in enumerate(lines) if line.startswith("ant &")]
    below = [cell.strip() for cell in lines[ant + 1].removesuffix(r"\\").split("&")]
    assert below == ["", r"\scriptsize[70, 95]", r"\scriptsize[30, 50]", *[""] * 6]
    assert lines[ant + 2].startswith("cat &")
    assert lines[ant + 3] == r"\midrule"  # no interval of the cat is defined
    assert r"& \scriptsize[60, 81] & \scriptsize[33, 53] &" in lines[ant + 5]


def test_latex_escapes_names_and_fits_a_column(tmp_path):
    names = [r"50%_a&b#c$d", r"\input{x}^2~y", "cat"]
    steps = [[names[1], names[0]], ["cat"]]
    text = latex.table(run_with_baseline(objects=names, steps=steps))
    assert r"50\%\_a\&b\#c\$d & " in text
    assert r"\textbackslash{}input\{x\}\textasciicircum{}2\textasciitilde{}y & " in text
    if program := shutil.which("pdflatex"):
        packages = r"\usepackage{booktabs}\usepackage{graphicx}"
        (tmp_path / "table.tex").write_text(text)
        body = "\\begin{document}\\noindent\\input{table}\n\\end{document}"
        page = rf"\documentclass[twocolumn]{{article}}{packages}{body}"
        (tmp_path / "page.tex").write_text(page)
        subprocess.run([program, "-halt-on-error", "page"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        assert "Overfull" not in (tmp_path / "page.log").read_text()


def test_names_are_escaped_in_csv_and_markdown():
    names = ["=HYPERLINK(1)", "a|b<img src=x>", "@cat"]
    results = run_with_baseline(objects=names, steps=[[names[1], names[0]], ["@cat"]])
    rows = list(csv.DictReader(io.StringIO(result_files.comma_separated(results))))
    assert [row["object"] for row in rows[:3]] == ["a|b<img src=x>", "'=HYPERLINK(1)", "'@cat"]
    assert rows[0]["fm_p_auroc"] == "" or float(rows[0]["fm_p_auroc"]) < 0  # negative numbers are not escaped
    text = tables.markdown(results)
    assert r"| a\|b&lt;img src=x&gt; " in text
    assert "<img" not in text


def test_comma_separated_values_read_back_to_the_last_digit():
    rows = list(csv.DictReader(io.StringIO(result_files.comma_separated(run_with_baseline()))))
    assert [(row["method"], row["object"], row["step"]) for row in rows] == [
        (method, *place)
        for method in ("ib_iumad", "feature_norm")
        for place in (("zebra", "0"), ("ant", "0"), ("cat", "1"), ("mean", ""))
    ]
    zebra, ant, cat, mean = rows[:4]
    assert (zebra["i_auroc"], ant["i_auroc"], cat["i_auroc"]) == ("0.7", "0.85", "0.6")
    assert float(mean["i_auroc"]) == (0.85 + 0.6 + 0.7) / 3
    assert (zebra["p_auroc"], zebra["p_auroc_object"], cat["fm_i_auroc"]) == ("", "", "")
    assert float(zebra["fm_i_auroc"]) == 0.8 - 0.7
    assert float(ant["fm_p_auroc"]) == 0.9 - 0.96
    assert float(mean["fm_aupro"]) == pytest.approx(0.1)
    assert rows[4]["aupro"] == "0.65"
    rows = list(csv.DictReader(io.StringIO(result_files.comma_separated(run_with_baseline(intervals=INTERVALS)))))
    assert [(row["low_i_auroc"], row["high_i_auroc"]) for row in rows[:4]] == [
        ("0.5", "0.8"), ("0.7", "0.948"), ("", ""), ("0.6", "0.81"),
    ]  # fmt: skip
    assert [row["high_aupro"] for row in rows[3:5]] == ["0.533", ""]
