"""Flags that say what the numbers in depth files to predict mean."""

import re

import pytest

from iumad_jax.data.readers.unlabelled import parse_unit
from iumad_jax.errors import UserError
from tests import sentences


@pytest.mark.parametrize(
    ("value", "metres"), [("mm", 0.001), ("UM", 1e-6), ("cm", 0.01), ("m", 1), ("0.00025", 0.00025), ("1e-6", 1e-6)]
)
def test_a_unit_is_a_name_or_metres(value: str, metres: float) -> None:
    assert parse_unit(value) == metres


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "inch", ""])
def test_another_unit_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentences.DEPTH_UNIT_WRONG.format(value))):
        parse_unit(value)
