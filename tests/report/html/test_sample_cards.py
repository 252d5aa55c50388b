"""The sample cards of the page: filters, order, and the pixels of masks and maps."""

import numpy as np
import pytest
from matplotlib import colormaps

from iumad_jax.report import html
from tests import sentences


def cards(page):
    """Return object, kind and pick of every visible card, in order."""
    texts = page.run(
        "[...document.querySelectorAll('.card')].filter(c => !c.hidden)"
        ".map(c => [c.querySelector('h3').innerText, ...[...c.querySelectorAll('.chip')].map(e => e.innerText)])"
    )
    return [tuple(card[:3]) for card in texts]


def all_cards(page):
    """Return object, kind, pick and verdict of every card, hidden or not."""
    return page.run(
        "[...document.querySelectorAll('.card')].map(c => [c.querySelector('h3').textContent,"
        " ...[...c.querySelectorAll('.chip')].map(e => e.textContent)])"
    )


def scroll_to(page, *card):
    """Scroll to a card and return its index."""
    index = [tuple(texts[: len(card)]) for texts in all_cards(page)].index(card)
    page.run(f"document.querySelectorAll('.card')[{index}].scrollIntoView({{behavior: 'instant', block: 'center'}})")
    page.settle()
    return index


def pixels(page, kind, index=0):
    """Return the pixels of a card's canvas; kind 0 is the mask, 1 the map."""
    values = page.run(
        f"(() => {{ const c = document.querySelectorAll('.card')[{index}].querySelectorAll('canvas')[{kind}];"
        " const copy = new OffscreenCanvas(c.width, c.height).getContext('2d'); copy.drawImage(c, 0, 0);"
        " return [...copy.getImageData(0, 0, c.width, c.height).data]; })()"
    )
    return np.array(values).reshape(32, 32, 4)


def test_samples_are_filtered_and_sorted(page, zoo):
    first = cards(page)
    assert len(first) == 12
    assert page.run("document.querySelector('#more').innerText") == sentences.SHOW_ALL.format(24)
    page.click("#more")
    all_visible = cards(page)
    assert all_visible[:12] == first
    assert len(all_visible) == 3 * (3 + 3 + 2)
    assert page.run("document.querySelector('#more').hidden")
    page.choose("#by-object", "ant")
    page.choose("#by-kind", "bump")
    assert cards(page) == [("ant", "bump", pick) for pick in ("best", "median", "worst")]
    assert page.run("document.querySelector('#count').innerText") == sentences.SAMPLES_SHOWN.format(shown=3, all=24)
    page.choose("#by-label", "good")
    assert cards(page) == []
    page.choose("#by-kind", "")
    page.choose("#by-object", "")
    page.choose("#by-pick", "worst")
    page.choose("#sort", "low")
    lowest = [min((zoo.predictions(name, 1)[0][zoo.VARIANTS[0]][:4].max(), name) for name in zoo.OBJECTS)[1]]
    assert cards(page)[0] == (*lowest, "good", "worst")
    assert len(cards(page)) == 3
    page.choose("#by-label", "")
    page.choose("#by-pick", "")
    page.choose("#sort", "object")
    assert cards(page) == all_visible


def test_the_slider_changes_the_masks(page, zoo):
    page.choose("#by-object", "ant")
    page.choose("#by-kind", "bump")
    index = scroll_to(page, "ant", "bump", "best")
    row = zoo.best_bump("ant")
    values, thresholds = zoo.upsampled("ant", row), zoo.summary("ant", 1).thresholds[zoo.VARIANTS[0]]
    page.run("document.querySelector('#threshold').focus({preventScroll: true})")
    covered = []
    for key, code, rate in (("Home", 36, -1), ("End", 35, 0), ("ArrowLeft", 37, 1)):
        page.press(key, code)
        drawn = pixels(page, 0, index)[..., 3] > 0
        clear = np.abs(values - thresholds[rate]) > 1e-3  # away from rounding errors
        np.testing.assert_array_equal(drawn[clear], (values > thresholds[rate])[clear])
        covered.append(drawn.sum())
        text = page.run("document.querySelector('#threshold-text').innerText")
        overlaps = [
            np.mean([zoo.summary(name, 1).overlap[method][rate] for name in zoo.OBJECTS]) for method in zoo.VARIANTS
        ]
        assert text.split(":")[1].split() == [f"{overlap:.3f}" for overlap in overlaps]
        assert page.run("document.querySelector('#threshold').ariaValueText") in (None, text)
    assert covered[0] > covered[2] >= covered[1]


def test_masks_at_the_decided_thresholds(page, zoo):
    """They are shown first, and again after the slider had set another threshold."""
    page.choose("#by-object", "bee")
    row = zoo.best_bump("bee")
    index = scroll_to(page, "bee", "bump", "best")
    threshold = zoo.decisions()[1]["objects"]["bee"]["pixel"]["threshold"]
    values = zoo.upsampled("bee", row)
    clear = np.abs(values - threshold) > 1e-3  # away from rounding errors
    decided = (values > threshold)[clear]
    np.testing.assert_array_equal((pixels(page, 0, index)[..., 3] > 0)[clear], decided)
    page.run("document.querySelector('#threshold').focus({preventScroll: true})")
    page.press("Home", 36)
    assert not page.run("document.querySelector('#decided').checked")
    assert ((pixels(page, 0, index)[..., 3] > 0)[clear] != decided).any()
    page.click("#decided")
    page.settle()
    scroll_to(page, "bee", "bump", "best")
    np.testing.assert_array_equal((pixels(page, 0, index)[..., 3] > 0)[clear], decided)
    rows = {row[0]: row[1:] for row in page.rows("#decision-table tbody")}
    assert list(rows) == ["cat", "ant", "bee"]
    image = zoo.decisions()[1]["objects"]["bee"]["image"]["threshold"]
    assert [float(value) for value in rows["bee"][5:7]] == pytest.approx([image, threshold], rel=1e-3)
    assert [rows["bee"][i] for i in (0, 3, 4)] == [
        "50.0 %",
        "100.0 %",
        "12.5 %",
    ]  # false alarms, recognised, bound on false alarms
    (mean,) = page.rows("#decision-table tfoot")
    alarms = [float(row[0].removesuffix(" %")) for row in rows.values()]
    assert float(mean[1].removesuffix(" %")) == pytest.approx(np.mean(alarms), abs=0.06)
    note = page.run("document.querySelector('#decisions-note').textContent")
    assert note.endswith(sentences.NEVER_LEARNED.format(never="yak 75.0 %", learned="25.0 %"))


def test_verdicts_are_the_decisions(page, zoo):
    for name in zoo.OBJECTS:
        alarm = zoo.summary(name, 1).alarm
        expected = [
            (sentences.FALSE_ALARM if zoo.KINDS[row] == "good" else sentences.DEFECT_FOUND) if alarm[row] else
            ("passed" if zoo.KINDS[row] == "good" else "missed")
            for row, *_ in html.pick(zoo.summary(name, 1))
        ]  # fmt: skip
        assert [card[3] for card in all_cards(page) if card[0] == name] == expected


def test_maps_after_the_first_step_with_the_object_and_after_the_last(page, zoo):
    row = zoo.best_bump("cat")
    index = scroll_to(page, "cat", "bump", "best")
    maps = [zoo.upsampled("cat", row, step) for step in (0, 1)]
    low, high = min(zoo.summary("cat", s).low for s in (0, 1)), max(zoo.summary("cat", s).high for s in (0, 1))
    for state, values in enumerate(maps):
        page.choose("#state", str(state))
        expected = colormaps["inferno"]((values - low) / (high - low))[..., :3] * 255
        assert np.abs(pixels(page, 1, index)[..., :3] - expected).mean() < 4


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
