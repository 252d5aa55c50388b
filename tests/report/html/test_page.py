"""The page of a run, used in a real browser and compared with the numbers in its data."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from iumad_jax.config import small
from iumad_jax.report import html, samples, tables
from iumad_jax.runtime.ledger import Ledger
from tests import sentences


def background(page):
    return page.run("getComputedStyle(document.body).backgroundColor")


def test_names_are_escaped(page, workdir, zoo):
    assert page.run("document.title") == tables.title(zoo.run())
    assert page.run("document.querySelector('h1').innerText") == tables.title(zoo.run())
    assert page.run("[...document.images].filter(i => !i.src.startsWith('data:')).length") == 0
    assert page.run("document.scripts.length") == 2
    assert zoo.EVIL in page.run("[...document.querySelectorAll('.chip')].map(chip => chip.innerText)")


def test_other_scripts_are_blocked(page):
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.evil = 1'}))")
    assert page.run("window.evil === undefined")
    assert len(page.errors) == 1
    assert "Content Security Policy" in page.errors.pop()


def test_what_was_learned_when(page, zoo):
    (ant, _, cat), (ant_after, bee, cat_after) = zoo.run()["matrix"]["i_auroc"]
    changes = {"ant": ant_after - ant, "cat": cat_after - cat}
    largest = max(changes, key=lambda name: abs(changes[name]))
    assert page.rows("#history-table")[1:] == [
        ["0", "2026-11-28 12:00", "8", f"learned cat {cat:.3f}, ant {ant:.3f}", "", f"{(cat + ant) / 2:.3f}", "-"],
        [
            "1",
            "2026-11-28 12:01",
            "9",
            f"learned bee {bee:.3f}",
            f"{largest} {changes[largest]:+.3f}",
            f"{(ant_after + bee + cat_after) / 3:.3f}",
            f"dataset.root={zoo.EVIL}",
        ],
    ]


def test_the_default_number_of_methods_have_different_colours(browser, tmp_path, zoo):
    zoo.write(tmp_path)
    baselines = {name: zoo.matrix("memory_bank") for name in small("6-4").baselines.split(",")}
    html.write(tmp_path, zoo.run(baselines=baselines))
    browser.open(tmp_path / "report.html")
    colours = browser.run(
        "[...document.querySelectorAll('.tile:first-child i')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours)) == len(colours) == 1 + len(baselines) == 4
    assert "rgba(0, 0, 0, 0)" not in colours  # a colour that is not defined


def test_each_kind_of_defect_is_shown_by_method(page, zoo):
    headers, *rows = page.rows("#kind-table")
    assert headers[:5] == ["kind", "method", "images", "alarms", "I-AUROC"]
    assert [row[:5] for row in rows[3:]] == [["bump", method, "6", "33.3%", "0.550"] for method in zoo.VARIANTS]
    assert [row[:5] for row in rows[:3]] == [[zoo.EVIL, method, "3", "33.3%", "0.500"] for method in zoo.VARIANTS]


def test_a_retired_object_is_shown_as_it_was_tested_last(browser, tmp_path, zoo):
    zoo.write(tmp_path)
    (tmp_path / "samples" / "step1_cat.npz").unlink()
    acts = [zoo.run()["acts"][0], {"act": "retire", "objects": ["cat"], "before": {}}]
    html.write(tmp_path, zoo.run(acts=acts, tested={"cat": 0}))
    browser.open(tmp_path / "report.html")
    assert browser.errors == []
    assert browser.rows("#history-table")[2][3] == "retired cat"
    assert [row[:2] for row in browser.rows("#object-table tbody")] == [
        ["cat", "0 (retired, tested after 0)"],
        ["ant", "0"],
        ["bee", "1"],
    ]
    browser.choose("#by-object", "cat")
    browser.choose("#by-kind", "bump")
    browser.choose("#by-pick", "best")
    scores, _ = zoo.predictions("cat", 0)
    best = max(scores[zoo.VARIANTS[0]][np.array(zoo.KINDS) == "bump"])
    cards = browser.run("[...document.querySelectorAll('.card')].filter(e => !e.hidden).map(e => e.innerText)")
    assert len(cards) == 1
    assert f"{best:.4g}" in cards[0]


@pytest.mark.parametrize("metric", ["i_auroc", "aupro", "p_auroc_object"])
def test_the_matrix_of_a_metric_with_its_baselines(page, metric, zoo):
    page.choose("#metric", metric)
    results = zoo.run()
    rows = page.rows("#matrix")
    assert rows[0] == ["after", "cat", "ant", "bee", "mean"]
    expected = []
    for name, method in tables.methods_of(results).items():
        expected.append([name])
        for step, values in enumerate(method["matrix"][metric]):
            ant, bee, cat = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
            learned = values[[2, 0]] if step == 0 else values
            expected.append([f"step {step}", cat, ant, "" if step == 0 else bee, f"{np.nanmean(learned):.3f}"])
    assert rows[1:] == expected
    summary = page.rows("#summary")
    assert summary[0] == [tables.METRICS[metric], "final", "acc", "fm", "fm_aggregate", "new"]
    for row, (name, method) in zip(summary[1:], tables.methods_of(results).items(), strict=True):
        assert row == [name, *(f"{method['summary'][metric][figure]:.3f}" for figure in tables.SUMMARY)]


def test_objects_sort_by_mouse_and_keyboard(page, zoo):
    values = zoo.run()["matrix"]["i_auroc"][1]
    by_value = [zoo.OBJECTS[i] for i in np.argsort(-values)]

    def order():
        return [row[0] for row in page.rows("#object-table tbody")]

    assert order() == ["cat", "ant", "bee"]  # the order of learning
    page.click("#object-table th:nth-child(3) button")
    assert order() == by_value
    assert page.run("document.querySelector('#object-table th:nth-child(3)').ariaSort") == "descending"
    page.press("Enter", 13)
    assert order() == by_value[::-1]
    page.click("#object-table th:nth-child(1) button")
    assert order() == ["ant", "bee", "cat"]
    undefined = 3 + [m for m in tables.METRICS if m != "aupro_exact"].index("p_auroc_object")
    for _ in range(2):
        page.click(f"#object-table th:nth-child({undefined}) button")
        assert order()[-1] == "ant"  # undefined values come last in both orders


def test_cells_show_baselines_beside_the_method(page, zoo):
    (cell,) = [row[2] for row in page.rows("#object-table tbody") if row[0] == "bee"]
    results = zoo.run()
    values = [method["matrix"]["i_auroc"][1][1] for method in tables.methods_of(results).values()]
    assert " ".join(cell.split()) == " ".join(f"{v:.3f} [{v - 0.1:.2f}, {v + 0.01:.2f}]" for v in values)
    means = [method["summary"]["i_auroc"]["final"] for method in tables.methods_of(results).values()]
    cell = page.rows("#object-table tfoot")[0][2]
    assert " ".join(cell.split()) == " ".join(f"{v:.3f} [{v - 0.05:.2f}, {v + 0.005:.2f}]" for v in means)
    assert f"{means[0]:.3f}\n[{means[0] - 0.05:.2f}, " in page.run("document.querySelector('.tile').innerText")
    (cell,) = [row[5] for row in page.rows("#object-table tbody") if row[0] == "ant"]
    assert cell.split() == ["–"] * 3  # undefined metrics have no interval


def test_curves_are_drawn_to_scale(page, zoo):
    """The area under a line on the screen is the metric printed beside it."""
    drawn = page.run(
        "[...document.querySelectorAll('.multiple')].map(m => [m.querySelector('h3').innerText,"
        " [...m.querySelectorAll('figure:first-child .line')].map(l => l.getAttribute('points')),"
        " [...m.querySelectorAll('figure:first-child .chance')]"
        ".map(l => ['x1', 'y1', 'x2', 'y2'].map(a => +l.getAttribute(a)))])"
    )
    assert [name for name, *_ in drawn] == ["cat", "ant", "bee"]
    labels = [kind != "good" for kind in zoo.KINDS]
    for name, lines, ((left, bottom, right, top),) in drawn:
        order = (*zoo.VARIANTS[1:], zoo.VARIANTS[0])  # the run's method is drawn last, on top
        for method, line in zip(order, lines, strict=True):
            x, y = np.array([point.split(",") for point in line.split()], float).T
            area = np.trapezoid((y - bottom) / (top - bottom), (x - left) / (right - left))
            assert area == pytest.approx(roc_auc_score(labels, zoo.predictions(name, 1)[0][method]), abs=1e-3)


def test_the_marker_on_the_curves_follows_the_slider(page):
    def positions():
        return page.run("[...document.querySelectorAll('.marker')].map(m => +m.getAttribute('x1'))")

    before = positions()
    assert len(before) == 3
    page.run("document.querySelector('#threshold').focus()")
    page.press("Home", 36)
    assert all(after > x for after, x in zip(positions(), before, strict=True))
    end = page.run("+document.querySelector('.marker').ownerSVGElement.querySelector('.grid').getAttribute('x2')")
    assert positions()[0] == pytest.approx(end)  # the largest false positive rate


def test_the_legend_names_the_losses_that_are_drawn(page):
    assert page.run("[...document.querySelectorAll('#loss-legend span')].map(e => e.innerText)") == [
        "loss",
        "fusion",
        "kl",
    ]
    assert "idle" in page.run("document.querySelector('#losses thead').textContent")


def test_colour_scheme_of_the_system_and_by_choice(page):
    light = background(page)
    page.click("#theme")
    assert page.run("document.querySelector('#theme').innerText") == "☀ light"
    assert background(page) == light
    page.click("#theme")
    dark = background(page)
    assert dark != light
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.click("#theme")
    assert page.run("document.querySelector('#theme').innerText") == "◐ auto"
    assert background(page) == dark
    page.click("#theme")
    assert background(page) == light


@pytest.mark.parametrize("width", [320, 390, 768, 1920])
def test_the_page_fits_windows_of_any_width(page, width):
    page.resize(width, 800)
    page.settle()
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.querySelector('.card').offsetWidth") <= width - 40
    assert page.run("[...document.querySelectorAll('.chart')].every(c => c.clientWidth >= 130)")
    if width < 500:  # controls are large enough to touch
        assert (
            page.run(
                "Math.min(...[...document.querySelectorAll('select, button')].filter(e => e.offsetParent)"
                ".map(e => e.offsetHeight))"
            )
            >= 20
        )


def test_all_controls_can_be_reached_by_keyboard(page):
    reached = []
    for _ in range(60):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        page.call("Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(page.run("document.activeElement.id || document.activeElement.className"))
    assert reached[0] == "skip"
    for control in ("theme", "metric", "by-object", "by-kind", "by-pick", "sort", "state", "threshold", "decided"):
        assert control in reached
    unnamed = page.run(
        "[...document.querySelectorAll('select, input, button, [role=region]')]"
        ".filter(e => !(e.labels?.length || e.ariaLabel || e.innerText)).length"
    )
    assert unnamed == 0


def test_a_single_step_without_depth_masks_decisions_training_or_test_images(browser, tmp_path, zoo):
    matrices = {metric: np.full((1, 1), math.nan) for metric in tables.METRICS} | {"i_auroc": np.array([[0.75]])}
    matrices = {
        metric: np.append(rows, [[math.nan]], axis=1) for metric, rows in matrices.items()
    }  # all metrics of the dog are undefined
    Ledger(tmp_path / "ledger.jsonl")
    intervals = {metric: zoo.intervals(rows[-1]) for metric, rows in matrices.items()}
    method = {"matrix": matrices, "summary": tables.summarise(matrices), "intervals": intervals}
    results = zoo.run(objects=["cat", "dog"], steps=[["cat", "dog"]], baselines={}, decisions=[], **method)
    rgb, heights, masks = zoo.truth("cat")
    unmasked = rgb, np.full_like(heights, np.nan), np.zeros_like(masks)
    pictures = samples.save_pictures(tmp_path, "cat", *unmasked, height_scale=1)
    samples.save(tmp_path, 0, "cat", zoo.summary("cat", 0, with_masks=False)._replace(pictures=pictures))
    html.write(tmp_path, results)
    browser.open(tmp_path / "report.html")
    assert browser.errors == []
    assert browser.rows("#matrix") == [
        ["after", "cat", "dog", "mean"],
        ["ib_iumad"],
        ["step 0", "0.750", "–", "0.750"],
    ]
    hidden = ["#state-label", "#decided-label", "#decisions", "#training figure"]
    assert browser.run(f"{hidden}.every(s => document.querySelector(s).hidden)")
    assert browser.run("document.querySelectorAll('.card:first-child .panels figure').length") == 3
    browser.resize(390, 800)
    browser.settle()
    assert browser.run("document.querySelector('#threshold').offsetWidth") > 200


def test_a_run_without_any_test_images(browser, tmp_path, zoo):
    matrices = {metric: np.full((1, 1), math.nan) for metric in tables.METRICS}
    intervals = {metric: zoo.intervals(rows[-1]) for metric, rows in matrices.items()}
    method = {"matrix": matrices, "summary": tables.summarise(matrices), "intervals": intervals, "kinds": {}}
    results = zoo.run(
        objects=["cat"], steps=[["cat"]], baselines={"feature_norm": method}, decisions=zoo.decisions()[:1], **method
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for epoch in range(20):
        ledger.append("epoch", step=0, epoch=epoch, loss=1.0 / (1 + epoch))
    html.write(tmp_path, results)
    browser.open(tmp_path / "report.html")
    assert browser.errors == []
    visible_sections = "[...document.querySelectorAll('main > section')].filter(e => !e.hidden).map(e => e.id)"
    assert browser.run(visible_sections) == ["overview", "objects", "training", "run"]
    visible_links = "[...document.querySelectorAll('nav a')].filter(e => !e.hidden).map(e => e.hash.slice(1))"
    assert browser.run(visible_links) == browser.run(visible_sections)
    assert sentences.NOTHING_MEASURED_PART in browser.run("document.querySelector('#remarks').innerText")
    assert browser.rows("#object-table") == [["object", "step"], ["cat", "0"]]
    assert "–" not in browser.run("document.querySelector('#overview').innerText")
    browser.settle()
    ticks = (
        "[...document.querySelectorAll('#loss-chart text')].filter(e => e.getBBox().y > 245).map(e => e.textContent)"
    )
    assert browser.run(ticks) == [
        "5",
        "10",
        "15",
        "20",
        sentences.EPOCHS_OF_ALL_STEPS,
    ]  # the first epoch is 1: no 0 beside the axis
