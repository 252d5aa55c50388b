"""The samples of the page: chosen, sorted, and their masks and maps to the pixel."""

import numpy as np
import pytest
from matplotlib import colormaps

from iumad_jax.report import html
from tests import sentences


def cards(page):
    """Every card in view, in order: object, kind, pick."""
    found = page.run(
        "[...document.querySelectorAll('.card')].filter(c => !c.hidden)"
        ".map(c => [c.querySelector('h3').innerText, ...[...c.querySelectorAll('.chip')].map(e => e.innerText)])"
    )
    return [tuple(card[:3]) for card in found]


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


def pixels(page, kind, index=0):
    """The pixels of a card's canvas: 0 the mask, 1 the map."""
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
    everything = cards(page)
    assert everything[:12] == first
    assert len(everything) == 3 * (3 + 3 + 2)
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
    assert cards(page) == everything


def test_the_slider_changes_the_masks(page, zoo):
    page.choose("#by-object", "ant")
    page.choose("#by-kind", "bump")
    shown = look_at(page, "ant", "bump", "best")
    row = zoo.best_bump("ant")
    values, thresholds = zoo.upsampled("ant", row), zoo.kept("ant", 1).thresholds[zoo.VARIANTS[0]]
    page.run("document.querySelector('#threshold').focus({preventScroll: true})")
    covered = []
    for key, code, rate in (("Home", 36, -1), ("End", 35, 0), ("ArrowLeft", 37, 1)):
        page.press(key, code)
        marked = pixels(page, 0, shown)[..., 3] > 0
        sure = np.abs(values - thresholds[rate]) > 1e-3
        np.testing.assert_array_equal(marked[sure], (values > thresholds[rate])[sure])
        covered.append(marked.sum())
        text = page.run("document.querySelector('#threshold-text').innerText")
        overlaps = [
            np.mean([zoo.kept(name, 1).overlap[method][rate] for name in zoo.OBJECTS]) for method in zoo.VARIANTS
        ]
        assert text.split(":")[1].split() == [f"{overlap:.3f}" for overlap in overlaps]
        assert page.run("document.querySelector('#threshold').ariaValueText") in (None, text)
    assert covered[0] > covered[2] >= covered[1]


def test_the_masks_as_they_were_decided(page, zoo):
    """As they are at first, and again after the slider had chosen another threshold."""
    page.choose("#by-object", "bee")
    row = zoo.best_bump("bee")
    shown = look_at(page, "bee", "bump", "best")
    threshold = zoo.decisions()[1]["objects"]["bee"]["pixel"]["threshold"]
    values = zoo.upsampled("bee", row)
    sure = np.abs(values - threshold) > 1e-3
    decided = (values > threshold)[sure]
    np.testing.assert_array_equal((pixels(page, 0, shown)[..., 3] > 0)[sure], decided)
    page.run("document.querySelector('#threshold').focus({preventScroll: true})")
    page.press("Home", 36)
    assert not page.run("document.querySelector('#decided').checked")
    assert ((pixels(page, 0, shown)[..., 3] > 0)[sure] != decided).any()
    page.click("#decided")
    page.settle()
    look_at(page, "bee", "bump", "best")
    np.testing.assert_array_equal((pixels(page, 0, shown)[..., 3] > 0)[sure], decided)
    found = {row[0]: row[1:] for row in page.rows("#decision-table tbody")}
    assert list(found) == ["cat", "ant", "bee"]
    image = zoo.decisions()[1]["objects"]["bee"]["image"]["threshold"]
    assert [float(value) for value in found["bee"][5:7]] == pytest.approx([image, threshold], rel=1e-3)
    assert [found["bee"][i] for i in (0, 3, 4)] == ["50.0 %", "100.0 %", "12.5 %"]  # false alarms, recognised, promised
    (mean,) = page.rows("#decision-table tfoot")
    alarms = [float(row[0].removesuffix(" %")) for row in found.values()]
    assert float(mean[1].removesuffix(" %")) == pytest.approx(np.mean(alarms), abs=0.06)
    note = page.run("document.querySelector('#decisions-note').textContent")
    assert note.endswith(sentences.NEVER_LEARNED.format(never="yak 75.0 %", learned="25.0 %"))


def test_verdicts_are_what_was_decided(page, zoo):
    for name in zoo.OBJECTS:
        alarm = zoo.kept(name, 1).alarm
        expected = [
            (sentences.FALSE_ALARM if zoo.KINDS[row] == "good" else sentences.DEFECT_FOUND) if alarm[row] else
            ("passed" if zoo.KINDS[row] == "good" else "missed")
            for row, *_ in html.pick(zoo.kept(name, 1))
        ]  # fmt: skip
        assert [card[3] for card in all_cards(page) if card[0] == name] == expected


def test_maps_after_the_step_that_learned_the_object_and_after_the_last(page, zoo):
    row = zoo.best_bump("cat")
    shown = look_at(page, "cat", "bump", "best")
    both = [zoo.upsampled("cat", row, step) for step in (0, 1)]
    low, high = min(zoo.kept("cat", s).low for s in (0, 1)), max(zoo.kept("cat", s).high for s in (0, 1))
    for state, values in enumerate(both):
        page.choose("#state", str(state))
        expected = colormaps["inferno"]((values - low) / (high - low))[..., :3] * 255
        assert np.abs(pixels(page, 1, shown)[..., :3] - expected).mean() < 4


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
