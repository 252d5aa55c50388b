"""What the steps of a run cost, from a workdir with known times and sizes."""

import json

import pytest

from tests.harness.steps import _bytes_added, _seconds


def event(kind, second):
    return {"event": kind, "time": f"2026-01-01T00:00:{second:02}.500+00:00"}


def test_seconds():
    """Two epochs until second 7, thresholds and a first evaluation until 9, all of them until 12; then a retirement."""
    first = [event("step", 2), event("epoch", 4), event("epoch", 7), event("evaluation", 9), event("evaluation", 11)]
    second = [event("step", 14), event("snapshot", 15)]
    assert _seconds([*first, event("snapshot", 12), *second]) == [(7, 5, 3), (3, 0, 0)]


def test_arrays_that_steps_share_count_once(tmp_path):
    names = ["a" * 64, "b" * 64, "c" * 64]
    (tmp_path / "by_object").mkdir()
    for name, size in zip(names, (1000, 200, 30), strict=True):
        (tmp_path / "by_object" / f"{name}.npy").write_bytes(bytes(size))
    for step, arrays in enumerate((names[:1], names)):
        folder = tmp_path / str(step)
        (folder / "record").mkdir(parents=True)
        (folder / "by_object.json").write_text(json.dumps({"weights/by_object": [{"w": arrays[0]}]}))
        (folder / "record" / "metadata").write_text(json.dumps({"kept": {name: {} for name in arrays[1:]}}))
        (folder / "arrays").write_bytes(bytes(7))
    added = list(_bytes_added(tmp_path, 2))
    on_disk = [sum(f.stat().st_size for f in (tmp_path / str(s)).rglob("*") if f.is_file()) for s in (0, 1)]
    assert added == [on_disk[0] + 1000, on_disk[1] + 230]
    assert sum(added) == pytest.approx(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))
