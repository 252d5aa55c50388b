"""Incremental metrics against examples by hand and plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.metrics import aggregate_forgetting, average_accuracy, drops, final, forgetting, plasticity
from tests import sentences

ALL = (final, average_accuracy, forgetting, aggregate_forgetting, plasticity)
nan = math.nan

# Objects a b | c | d, learned in three steps.
THREE_STEPS = [
    [0.90, 0.80, nan, nan],
    [0.70, 0.85, 0.60, nan],
    [0.75, 0.50, 0.40, 0.95],
]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (final, (0.75 + 0.50 + 0.40 + 0.95) / 4),
        (average_accuracy, (0.85 + (0.70 + 0.85 + 0.60) / 3 + 0.65) / 3),
        (
            forgetting,
            ((0.90 - 0.75) + (0.85 - 0.50) + (0.60 - 0.40)) / 3,
        ),  # object b has its best value after the second step
        (aggregate_forgetting, ((0.85 - (0.70 + 0.85 + 0.60) / 3) + (0.85 - 0.65)) / 2),
        (plasticity, (0.90 + 0.80 + 0.60 + 0.95) / 4),
    ],
)
def test_three_steps(function, expected):
    value = function(THREE_STEPS)
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-15)


def test_forgetting_of_each_object():
    np.testing.assert_allclose(drops(THREE_STEPS), [0.15, 0.35, 0.20, nan], atol=1e-15)


def test_two_steps():
    matrix = [[0.9, nan], [0.6, 0.8]]
    values = {function.__name__: function(matrix) for function in ALL}
    assert values == pytest.approx(
        {
            "final": 0.7,
            "average_accuracy": 0.8,
            "forgetting": 0.3,
            "aggregate_forgetting": 0.2,
            "plasticity": 0.85,
        }
    )


def test_one_step_has_nothing_to_forget():
    matrix = [[0.9, 0.5]]
    assert final(matrix) == average_accuracy(matrix) == plasticity(matrix) == pytest.approx(0.7)
    assert math.isnan(forgetting(matrix))
    assert math.isnan(aggregate_forgetting(matrix))


def test_improvement_is_negative_forgetting():
    assert forgetting([[0.5, nan], [0.9, 0.1]]) == pytest.approx(-0.4)


def test_an_undefined_object_is_left_out():
    """An object whose metric is undefined changes no result, whatever its position."""
    matrix = np.asarray(THREE_STEPS)
    for column in range(5):
        wider = np.insert(matrix, column, nan, axis=1)
        assert [function(wider) for function in ALL] == [function(matrix) for function in ALL]


def test_all_objects_undefined():
    for steps in (1, 2, 3):
        assert all(math.isnan(function(np.full((steps, 2), nan))) for function in ALL)


def test_base_objects_undefined():
    """Without a defined base object there is no base mean, and the first step is left out of every mean."""
    matrix = [[nan, nan, nan], [nan, 0.8, nan], [nan, 0.6, 0.4]]
    assert math.isnan(aggregate_forgetting(matrix))
    assert average_accuracy(matrix) == pytest.approx((0.8 + 0.5) / 2)
    assert forgetting(matrix) == pytest.approx(0.2)
    assert plasticity(matrix) == pytest.approx(0.6)


def test_only_the_newest_object_defined():
    matrix = [[nan, nan], [nan, 0.8]]
    assert final(matrix) == average_accuracy(matrix) == plasticity(matrix) == 0.8
    assert math.isnan(forgetting(matrix))


def test_json_null_is_undefined():
    assert forgetting([[0.9, None], [0.6, 0.8]]) == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [[], 0.5, [0.5, 0.6], [[[0.5]]], [[0.5, math.inf]]])
def test_bad_matrices(bad):
    for function in ALL:
        with pytest.raises(ValueError, match=sentences.NOT_A_MATRIX):
            function(bad)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_equals_plain_loops(steps, per_step, seed):
    rng = np.random.default_rng(seed)
    step_of = sorted(rng.integers(0, steps, steps * per_step))
    step_of[0] = 0
    undefined = {c for c in range(len(step_of)) if rng.random() < 0.2}
    value = {
        (step, c): rng.random() for c, first in enumerate(step_of) for step in range(first, steps) if c not in undefined
    }
    matrix = [[value.get((step, c), nan) for c in range(len(step_of))] for step in range(steps)]

    def mean(values):
        return sum(values) / len(values) if values else nan

    last = steps - 1
    means = [mean([v for (step, _), v in value.items() if step == s]) for s in range(steps)]
    old = [c for c, first in enumerate(step_of) if first < last and c not in undefined]
    expected = [
        means[last],
        mean([m for m in means if not math.isnan(m)]),
        mean([max(value[s, c] for s in range(step_of[c], last)) - value[last, c] for c in old]),
        mean([means[0] - m for m in means[1:] if not math.isnan(means[0] - m)]),
        mean([value[first, c] for c, first in enumerate(step_of) if c not in undefined]),
    ]
    assert [function(matrix) for function in ALL] == pytest.approx(expected, abs=1e-12, nan_ok=True)
