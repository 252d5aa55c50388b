"""Names of objects and folders that a person writes so that they mean something else."""

import re
from pathlib import Path

import pytest

from iumad_jax.data.formats.files import opening, select
from iumad_jax.errors import UserError
from tests import sentences


def test_a_name_with_a_comma_must_be_changed_to_be_chosen() -> None:
    available = "bolt,left", "nut"
    assert select("nut", available) == ("nut",)
    assert select(["bolt,left"], available) == ("bolt,left",)
    for chosen in ("bolt,left", "nut,bolt,left"):
        with pytest.raises(UserError, match='divides names at commas; rename "bolt,left"'):
            select(chosen, available)
    with pytest.raises(UserError, match=sentences.UNKNOWN_OBJECT.format(name="pin", known="bolt,left, nut")):
        select("pin", available)


def test_a_tilde_that_the_shell_left_is_told() -> None:
    for root, told in (("~/objects", True), ("objects~", False)):
        with (
            pytest.raises(UserError, match=re.escape(sentences.ROOT_NOT_A_FOLDER.format(root))) as error,
            opening(Path(root)),
        ):
            pass
        assert ("write $HOME" in str(error.value)) == told
