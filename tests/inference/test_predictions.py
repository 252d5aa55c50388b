"""Reading, judging and writing overlap without changing the order."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.inference import predictions


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 3))))
def test_items_keep_their_order_and_pauses_finish_what_is_under_way(items):
    def work(milliseconds):
        time.sleep(milliseconds / 1e3)
        return milliseconds

    taken, given_ = [], []

    def take():
        for item in items:
            taken.append(item)
            yield item

    with ThreadPoolExecutor(2) as pool:
        results = []
        for result in predictions._in_threads(pool, work, take()):
            if result is None:
                assert len(given_) == len([item for item in taken if item is not None])
                results.append(None)
            else:
                given_.append(result[0])
                results.append(result[1].result())
            ahead = len([item for item in taken if item is not None]) - len(given_)
            assert ahead <= predictions._THREADS
    assert results == items


def test_items_are_worked_on_at_the_same_time():
    meeting = threading.Barrier(2, timeout=10)
    with ThreadPoolExecutor(2) as pool:
        results = predictions._in_threads(pool, lambda _: meeting.wait() >= 0, [1, 2])
        assert [future.result() for _, future in results] == [True, True]


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        (["good"], "1 image: 1 good, 0 anomalous, 0 unknown"),
        (["good", "unknown"], "2 images: 1 good, 0 anomalous, 1 unk"),
    ],
)
def test_the_summary_counts_in_words(decisions, expected):
    assert predictions.summary({"decision": decision} for decision in decisions).startswith(expected)


@pytest.mark.parametrize("shape", [(30, 20), (1944, 2592), (700, 200)])
def test_pictures_are_bounded_and_keep_their_proportions(shape):
    rgb = np.zeros((*shape, 3), np.uint8)
    rgb[: shape[0] // 2] = 200
    reduced = predictions._reduced(rgb, 640)
    assert max(reduced.shape) == min(max(shape), 640)
    assert reduced.shape[0] / reduced.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.01)
    assert reduced.mean() == pytest.approx(rgb.mean(), rel=0.01)
    assert predictions._reduced(rgb, None).shape == rgb.shape
