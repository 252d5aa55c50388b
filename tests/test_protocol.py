"""Steps of protocols, by hand and by their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iumad_jax.errors import UserError
from iumad_jax.protocol import steps
from tests import sentences

OBJECTS = tuple("abcdefghij")


@pytest.mark.parametrize(
    ("protocol", "learned"),
    [
        ("10-0", ["abcdefghij"]),
        ("9-1", ["abcdefghi", "j"]),
        ("6-4", ["abcdef", "ghij"]),
        ("6-1", ["abcdef", "g", "h", "i", "j"]),
        ("1-1", list("abcdefghij")),
        ("4-3", ["abcd", "efg", "hij"]),
    ],
)
def test_steps_learn_the_objects_in_order(protocol, learned):
    actual = steps(protocol, OBJECTS)
    assert ["".join(step.learned) for step in actual] == learned
    assert ["".join(step.seen) for step in actual] == ["".join(learned[: i + 1]) for i in range(len(learned))]
    assert [step.index for step in actual] == list(range(len(learned)))


def test_one_object_is_one_step():
    (step,) = steps("1-0", ("CandyCane",))
    assert step.learned == step.seen == ("CandyCane",)


@pytest.mark.parametrize("protocol", ["7-2", "6-0", "0-1", "0-0", "11-1", "3-8", "99-1"])
def test_a_protocol_that_does_not_fit_is_refused(protocol):
    with pytest.raises(UserError, match=sentences.PROTOCOL_DOES_NOT_FIT.format(protocol=protocol, objects=10)):
        steps(protocol, OBJECTS)


@pytest.mark.parametrize("protocol", ["", "6", "6-", "-1", "6--1", "6-1-1", "6 - 1", "6-1\n", "six-one", "6.0-1"])
def test_an_invalid_protocol_is_refused(protocol):
    with pytest.raises(UserError, match=sentences.PROTOCOL_MALFORMED):
        steps(protocol, OBJECTS)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_every_object_is_learned_once_or_the_protocol_refused(base, new, count):
    objects = tuple(map(str, range(count)))
    fits = count > 0 and any(base + i * new == count for i in range(count)) and base > 0
    if not fits:
        with pytest.raises(UserError):
            steps(f"{base}-{new}", objects)
        return
    first, *others = steps(f"{base}-{new}", objects)
    assert len(first.learned) == base
    assert all(len(step.learned) == new for step in others)
    seen = ()
    for step in (first, *others):
        seen += step.learned
        assert step.seen == seen
    assert seen == objects
