"""The page of a run: what it says against the numbers it was made from, read and driven in a real browser."""

import json
import math
import re

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from sklearn.metrics import roc_auc_score

from iumad_jax.errors import UserError
from iumad_jax.metrics import pro_curve
from iumad_jax.report import html, samples, tables
from iumad_jax.report.ledger import Ledger

EVIL = "</script><img src=x onerror=document.title='evil'>\"'&"
OBJECTS = ["ant", "bee", "cat"]  # the protocol learns the cat and the ant, then the bee
STEPS = [["cat", "ant"], ["bee"]]
SYSTEMS = ("ib_iumad", "feature_norm", "nearest_neighbours")
KINDS = ["good"] * 4 + ["bump"] * 3 + [EVIL] * 2
SIZE = 32


def truth(name):
    """Red photographs with a green square, a bump of 2 cm on a plane, and defects in the corner."""
    rng = np.random.default_rng(OBJECTS.index(name))
    rgb = np.full((len(KINDS), SIZE, SIZE, 3), (150, 60, 40), np.uint8)
    rgb[:, 8:24, 8:24] = (40, 120, 60)
    depth = np.full((len(KINDS), SIZE, SIZE), 0.5, np.float32)
    depth[:, 8:24, 8:24] = 0.48
    masks = np.zeros((len(KINDS), SIZE, SIZE), bool)
    for row, kind in enumerate(KINDS):
        if kind != "good":
            y, x = rng.integers(4, 20, 2)
            masks[row, y : y + 8, x : x + 8] = True
    return rgb, depth, masks


def predictions(name, step):
    """By system: scores and maps, of which the run's own method sees most."""
    rng = np.random.default_rng([OBJECTS.index(name), step])
    *_, masks = truth(name)
    maps = {
        system: (rng.random(masks.shape) + (2 - place) * masks * rng.random((len(masks), 1, 1))).astype(np.float32)
        for place, system in enumerate(SYSTEMS)
    }
    return {system: of_system.max(axis=(1, 2)) for system, of_system in maps.items()}, maps


def kept(name, step, marked=True):
    scores, maps = predictions(name, step)
    ids = [f"{row:03}" for row in range(len(KINDS))]
    anomalous = [kind != "good" for kind in KINDS]
    return samples.summarise(ids, KINDS, anomalous, truth(name)[2] if marked else None, scores, maps)


def matrix(system):
    rng = np.random.default_rng(SYSTEMS.index(system))
    values = rng.uniform(0.4, 0.99, (2, 3))
    values[0, OBJECTS.index("bee")] = math.nan
    metrics = {metric: values ** (1 + place / 4) for place, metric in enumerate(tables.METRICS)}
    metrics["p_auroc_object"] = np.where(np.arange(3) == 0, np.nan, metrics["p_auroc_object"])  # undefined for the ant
    return {"matrix": metrics, "summary": tables.summarise(metrics), "bytes": 1_500_000}


def run(**others):
    own, *floors = SYSTEMS
    return {
        "config": {"method": own, "dataset": {"name": EVIL}, "modality": "rgb+depth", "seed": 3},
        "protocol": "2-1",
        "objects": OBJECTS,
        "steps": STEPS,
        **matrix(own),
        "floors": {system: matrix(system) for system in floors},
        "decisions": decisions(),
        "seconds": 75.0,
        "versions": {"jax": "0.11"},
        **others,
    }


def decisions():
    """As after both steps: half of the good images pass."""

    def limit(value):
        return {"threshold": value, "interval": [value - 0.1, value + 0.1], "images": 7, "at_most": 0.125}

    def of(name, step):
        scores, maps = predictions(name, step)
        good = np.array(KINDS) == "good"
        image, pixel = np.median(scores[SYSTEMS[0]][good]), np.quantile(maps[SYSTEMS[0]][good], 0.9)
        alarm = scores[SYSTEMS[0]] > image
        test = {"false_alarms": alarm[good].mean(), "misses": (~alarm[~good]).mean(), "recognised": 1.0}
        return {"image": limit(float(image)), "pixel": limit(float(pixel)), "test": test | {"taken_as_unknown": 0.25}}

    learned = [["cat", "ant"], ["cat", "ant", "bee"]]
    return [{"quantile": 0.5, "objects": {name: of(name, step) for name in learned[step]}} for step in (0, 1)]


def images(name, rows):
    return tuple(array[list(rows)] for array in truth(name))


def write(workdir, **others):
    results = run(**others)
    for step, name in ((0, "cat"), (0, "ant"), (1, "cat"), (1, "ant"), (1, "bee")):
        samples.save(workdir, step, name, kept(name, step))
    ledger = Ledger(workdir / "ledger.jsonl")
    for step in (0, 1):
        for epoch in range(5):
            ledger.append("epoch", step=step, epoch=epoch, loss=10.0 / (1 + epoch), fusion=5.0 / (1 + epoch), kl=0.01)
    html.write(workdir, results, images)
    return results


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder)
    return folder


@pytest.fixture
def page(browser, workdir):
    browser.open(workdir / "report.html")
    yield browser
    assert browser.errors == []


def embedded(path):
    """The data of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def rows(page, table):
    """The text of every cell of a table."""
    return page.run(f"[...document.querySelectorAll('{table} tr')].map(r => [...r.cells].map(c => c.innerText.trim()))")


def cards(page):
    """Every card in view, in order: object, kind, pick."""
    found = page.run(
        "[...document.querySelectorAll('.card')].filter(c => !c.hidden)"
        ".map(c => [c.querySelector('h3').innerText, ...[...c.querySelectorAll('.chip')].map(e => e.innerText)])"
    )
    return [tuple(card[:3]) for card in found]


def pixels(page, kind, index=0):
    """The pixels of a card's canvas: 0 the mask, 1 the map."""
    values = page.run(
        f"(() => {{ const c = document.querySelectorAll('.card')[{index}].querySelectorAll('canvas')[{kind}];"
        " const copy = new OffscreenCanvas(c.width, c.height).getContext('2d'); copy.drawImage(c, 0, 0);"
        " return [...copy.getImageData(0, 0, c.width, c.height).data]; })()"
    )
    return np.array(values).reshape(SIZE, SIZE, 4)


# ---- what goes into the page ----


def test_the_best_the_median_and_the_worst_of_every_kind():
    scores = np.array([0.3, 0.1, 0.2, 0.9, 0.5, 0.7, 0.6])
    of_object = samples.summarise(
        list("abcdefg"), ["good"] * 3 + ["bump"] * 2 + ["dent", "good"], [0, 0, 0, 1, 1, 1, 0], None, {"ours": scores},
        {"ours": np.zeros((7, 8, 8))},
    )  # fmt: skip
    assert html.pick(of_object) == [
        (1, "best", 1, 4),  # good: 0.1 < 0.2 < 0.3 < 0.6
        (0, "median", 3, 4),
        (6, "worst", 4, 4),
        (3, "best", 1, 2),  # bump: 0.9 > 0.5
        (4, "worst", 2, 2),
        (5, "worst", 1, 1),  # the only dent
    ]


def test_the_outline_encloses_the_mask():
    mask = np.zeros((20, 30), bool)
    mask[2:9, 4:15] = True
    mask[4:6, 6:10] = False  # a hole
    mask[15:, 25:] = True  # at the border
    area = 0
    for line in html.outline(mask).split("M")[1:]:
        x, y = np.array([point.split() for point in line.rstrip("Z").split("L")], float).T
        area += (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        assert x.min() >= 4
        assert x.max() <= 30
    corners = 3 * 4 * 0.125  # each is cut, or filled in the hole; outside and hole run in opposite directions
    assert abs(area) == pytest.approx(mask.sum(), abs=corners)
    assert html.outline(np.zeros((4, 4))) == ""


def test_pictures_that_do_not_fit_are_left_out_median_first(workdir, tmp_path, monkeypatch):
    whole = embedded(workdir / "report.html")["samples"]
    size = len(json.dumps(whole)) / len(whole)
    monkeypatch.setattr(html, "BUDGET", int(12.5 * size))
    write(tmp_path)
    found = embedded(tmp_path / "report.html")
    kept = [one["pick"] for one in found["samples"]]
    assert kept.count("worst") == 9  # three objects, three kinds
    assert 1 <= kept.count("best") <= 4
    assert "median" not in kept
    assert found["left_out"] == len(whole) - len(kept)


def test_a_run_without_its_samples_is_told_of(workdir, tmp_path):
    with pytest.raises(UserError, match=r"step1_cat\.npz cannot be read"):
        html.write(tmp_path, run(), images)


def test_curves_are_those_of_sklearn(workdir):
    curves = embedded(workdir / "report.html")["curves"]
    for name in OBJECTS:
        scores, maps = predictions(name, 1)
        for system in SYSTEMS:
            x, y = curves[name][system]["roc"]
            labels = [kind != "good" for kind in KINDS]
            assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(labels, scores[system]), abs=1e-4)
            overlap, _ = pro_curve(truth(name)[2], maps[system], samples.RATES)
            np.testing.assert_allclose(curves[name][system]["overlap"], overlap, atol=1e-5)


# ---- the page in a browser ----


def test_names_stay_names(page, workdir):
    assert page.run("document.title") == tables.title(run())
    assert page.run("document.querySelector('h1').innerText") == tables.title(run())
    assert page.run("[...document.images].filter(i => !i.src.startsWith('data:')).length") == 0
    assert page.run("document.scripts.length") == 2
    assert any(kind == EVIL for _, kind, _ in cards(page))


def test_nothing_but_its_own_script_may_run(page):
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.evil = 1'}))")
    assert page.run("window.evil === undefined")
    assert len(page.errors) == 1
    assert "Content Security Policy" in page.errors.pop()


@pytest.mark.parametrize("metric", ["i_auroc", "aupro", "p_auroc_object"])
def test_the_matrix_of_a_metric_with_its_floors(page, metric):
    page.choose("#metric", metric)
    results = run()
    found = rows(page, "#matrix")
    assert found[0] == ["after", "cat", "ant", "bee", "mean"]
    expected = []
    for name, system in tables.systems_of(results).items():
        expected.append([name])
        for step, values in enumerate(system["matrix"][metric]):
            ant, bee, cat = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
            learned = values[[2, 0]] if step == 0 else values
            expected.append([f"step {step}", cat, ant, "" if step == 0 else bee, f"{np.nanmean(learned):.3f}"])
    assert found[1:] == expected
    summary = rows(page, "#summary")
    assert summary[0] == [tables.METRICS[metric], "final", "acc", "fm", "fm_aggregate", "new"]
    for row, (name, system) in zip(summary[1:], tables.systems_of(results).items(), strict=True):
        assert row == [name, *(f"{system['summary'][metric][figure]:.3f}" for figure in tables.SUMMARY)]


def test_objects_sort_by_mouse_and_keyboard(page):
    values = run()["matrix"]["i_auroc"][1]
    by_value = [OBJECTS[i] for i in np.argsort(-values)]

    def order():
        return [row[0] for row in rows(page, "#object-table tbody")]

    assert order() == ["cat", "ant", "bee"]  # as they were learned
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
        assert order()[-1] == "ant"  # what is undefined comes last either way


def test_floors_stand_beside_the_method_in_every_cell(page):
    (cell,) = [row[2] for row in rows(page, "#object-table tbody") if row[0] == "bee"]
    results = run()
    assert cell.split() == [
        f"{system['matrix']['i_auroc'][1][1]:.3f}" for system in tables.systems_of(results).values()
    ]


def test_samples_are_filtered_and_sorted(page):
    everything = cards(page)
    assert len(everything) == 3 * (3 + 3 + 2)
    page.choose("#by-object", "ant")
    page.choose("#by-kind", "bump")
    assert cards(page) == [("ant", "bump", pick) for pick in ("best", "median", "worst")]
    assert page.run("document.querySelector('#count').innerText") == "3 of 24 samples"
    page.choose("#by-label", "good")
    assert cards(page) == []
    page.choose("#by-kind", "")
    page.choose("#by-object", "")
    page.choose("#by-pick", "worst")
    page.choose("#sort", "low")
    lowest = [min((predictions(name, 1)[0][SYSTEMS[0]][:4].max(), name) for name in OBJECTS)[1]]
    assert cards(page)[0] == (*lowest, "good", "worst")
    assert len(cards(page)) == 3
    page.choose("#by-label", "")
    page.choose("#by-pick", "")
    page.choose("#sort", "object")
    assert cards(page) == everything


def best_bump(name):
    """The number of its image."""
    scores = predictions(name, 1)[0][SYSTEMS[0]]
    return max((row for row, kind in enumerate(KINDS) if kind == "bump"), key=lambda row: scores[row])


def upsampled(name, row, step=1):
    """A kept map at the size of the image, by an independent route."""
    of_step = kept(name, step)
    small = of_step.low + of_step.maps[row] / 255 * (of_step.high - of_step.low)
    return np.asarray(Image.fromarray(small.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def test_the_slider_changes_the_masks(page):
    page.choose("#by-object", "ant")
    page.choose("#by-kind", "bump")
    shown = look_at(page, "ant", "bump", "best")
    row = best_bump("ant")
    values, thresholds = upsampled("ant", row), kept("ant", 1).thresholds[SYSTEMS[0]]
    page.run("document.querySelector('#threshold').focus({preventScroll: true})")
    covered = []
    for key, code, rate in (("Home", 36, -1), ("End", 35, 0), ("ArrowLeft", 37, 1)):
        page.press(key, code)
        marked = pixels(page, 0, shown)[..., 3] > 0
        sure = np.abs(values - thresholds[rate]) > 1e-3
        np.testing.assert_array_equal(marked[sure], (values > thresholds[rate])[sure])
        covered.append(marked.sum())
        text = page.run("document.querySelector('#threshold-text').innerText")
        overlaps = [np.mean([kept(name, 1).overlap[system][rate] for name in OBJECTS]) for system in SYSTEMS]
        assert text.split(":")[1].split() == [f"{overlap:.3f}" for overlap in overlaps]
        assert page.run("document.querySelector('#threshold').ariaValueText") in (None, text)
    assert covered[0] > covered[2] >= covered[1]


def all_cards(page):
    """Of every card, hidden or not: object, kind, pick and verdict."""
    return page.run(
        "[...document.querySelectorAll('.card')].map(c => [c.querySelector('h3').textContent,"
        " ...[...c.querySelectorAll('.chip')].map(e => e.textContent)])"
    )


def look_at(page, *card):
    """Scrolls to a card and returns its number."""
    index = [tuple(one[: len(card)]) for one in all_cards(page)].index(card)
    page.run(f"document.querySelectorAll('.card')[{index}].scrollIntoView({{behavior: 'instant', block: 'center'}})")
    page.settle()
    return index


def test_the_masks_as_they_were_decided(page):
    page.click("#decided")
    row = best_bump("bee")
    shown = look_at(page, "bee", "bump", "best")
    threshold = decisions()[1]["objects"]["bee"]["pixel"]["threshold"]
    values = upsampled("bee", row)
    sure = np.abs(values - threshold) > 1e-3
    np.testing.assert_array_equal((pixels(page, 0, shown)[..., 3] > 0)[sure], (values > threshold)[sure])
    assert page.run("document.querySelector('#threshold').disabled")
    found = {row[0]: row[1:] for row in rows(page, "#decision-table tbody")}
    assert list(found) == ["cat", "ant", "bee"]
    image = decisions()[1]["objects"]["bee"]["image"]["threshold"]
    assert [float(value) for value in found["bee"][:2]] == pytest.approx([image, threshold], rel=1e-3)
    assert found["bee"][2::2] == ["50.0 %", "100.0 %"]  # of false alarms, and recognised


def test_verdicts_follow_the_threshold(page):
    for name in OBJECTS:
        scores = predictions(name, 1)[0][SYSTEMS[0]]
        alarm = scores > decisions()[1]["objects"][name]["image"]["threshold"]
        expected = [
            ("false alarm" if KINDS[row] == "good" else "alarm") if alarm[row] else
            ("passed" if KINDS[row] == "good" else "missed")
            for row, *_ in html.pick(kept(name, 1))
        ]  # fmt: skip
        assert [card[3] for card in all_cards(page) if card[0] == name] == expected


def test_maps_after_the_step_that_learned_the_object_and_after_the_last(page):
    row = best_bump("cat")
    shown = look_at(page, "cat", "bump", "best")
    both = [upsampled("cat", row, step) for step in (0, 1)]
    low, high = min(kept("cat", s).low for s in (0, 1)), max(kept("cat", s).high for s in (0, 1))
    for state, values in enumerate(both):
        page.choose("#state", str(state))
        expected = colormaps["inferno"]((values - low) / (high - low))[..., :3] * 255
        assert np.abs(pixels(page, 1, shown)[..., :3] - expected).mean() < 4


def test_curves_are_drawn_to_scale(page):
    """The area under the lines on the screen is the number beside them."""
    drawn = page.run(
        "[...document.querySelectorAll('.multiple')].map(m => [m.querySelector('h3').innerText,"
        " [...m.querySelectorAll('figure:first-child .line')].map(l => l.getAttribute('points')),"
        " [...m.querySelectorAll('figure:first-child .chance')]"
        ".map(l => ['x1', 'y1', 'x2', 'y2'].map(a => +l.getAttribute(a)))])"
    )
    assert [name for name, *_ in drawn] == ["cat", "ant", "bee"]
    labels = [kind != "good" for kind in KINDS]
    for name, lines, ((left, bottom, right, top),) in drawn:
        order = (*SYSTEMS[1:], SYSTEMS[0])  # the run's own lies on top
        for system, line in zip(order, lines, strict=True):
            x, y = np.array([point.split(",") for point in line.split()], float).T
            area = np.trapezoid((y - bottom) / (top - bottom), (x - left) / (right - left))
            assert area == pytest.approx(roc_auc_score(labels, predictions(name, 1)[0][system]), abs=1e-3)


def test_the_marker_on_the_curves_follows_the_slider(page):
    def at():
        return page.run("[...document.querySelectorAll('.marker')].map(m => +m.getAttribute('x1'))")

    before = at()
    assert len(before) == 3
    page.run("document.querySelector('#threshold').focus()")
    page.press("Home", 36)
    assert all(after > x for after, x in zip(at(), before, strict=True))
    end = page.run("+document.querySelector('.marker').ownerSVGElement.querySelector('.grid').getAttribute('x2')")
    assert at()[0] == pytest.approx(end)  # the largest rate


def background(page):
    return page.run("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark_by_the_system_and_by_choice(page):
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
def test_nothing_sticks_out_of_a_window_of_any_width(page, width):
    page.resize(width, 800)
    page.settle()
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.querySelector('.card').offsetWidth") <= width - 40
    assert page.run("[...document.querySelectorAll('.chart')].every(c => c.clientWidth >= 130)")
    if width < 500:  # of what is touched, nothing is too small
        assert page.run("Math.min(...[...document.querySelectorAll('select, button')].map(e => e.offsetHeight))") >= 20


def test_everything_can_be_reached_by_keyboard(page):
    reached = []
    for _ in range(45):
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


def test_printing_shows_every_sample(page):
    page.call("Page.printToPDF", printBackground=True)
    page.call("Emulation.setEmulatedMedia", media="print")
    page.resize(794, 1123)  # A4
    page.settle()
    assert page.run("document.documentElement.scrollWidth") == 794
    drawn = page.run(
        "[...document.querySelectorAll('.card')].map(c => c.querySelectorAll('canvas')[1])"
        ".map(c => c.getContext('2d').getImageData(0, 0, 1, 1).data[3])"
    )
    assert drawn == [255] * 24
    assert page.run("[...document.querySelectorAll('details')].every(d => d.open)")


def test_a_single_step_without_depth_masks_decisions_or_training(browser, tmp_path):
    matrices = {metric: np.full((1, 1), math.nan) for metric in tables.METRICS} | {"i_auroc": np.array([[0.75]])}
    samples.save(tmp_path, 0, "cat", kept("cat", 0, marked=False))
    Ledger(tmp_path / "ledger.jsonl")
    own = {"matrix": matrices, "summary": tables.summarise(matrices)}
    results = run(objects=["cat"], steps=[["cat"]], floors={}, decisions=[], **own)

    def flat(name, rows):
        rgb, depth, masks = images(name, rows)
        return rgb, np.full_like(depth, np.nan), np.zeros_like(masks)

    html.write(tmp_path, results, flat)
    browser.open(tmp_path / "report.html")
    assert browser.errors == []
    assert rows(browser, "#matrix") == [["after", "cat", "mean"], ["ib_iumad"], ["step 0", "0.750", "0.750"]]
    absent = ["#state-label", "#decided-label", "#decisions", "#training figure"]
    assert browser.run(f"{absent}.every(s => document.querySelector(s).hidden)")
    assert browser.run("document.querySelectorAll('.card:first-child .panels figure').length") == 3
    browser.resize(390, 800)
    browser.settle()
    assert browser.run("document.querySelector('#threshold').offsetWidth") > 200
