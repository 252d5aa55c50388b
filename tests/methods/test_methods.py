"""Building methods from a config."""

import pytest

from iumad_jax.config import modalities, paper
from iumad_jax.errors import UserError
from iumad_jax.methods import build
from tests import sentences


def test_modalities():
    config = paper("10-0")
    assert modalities(config) == ("rgb", "depth")
    config.modality = "depth"
    assert modalities(config) == ("depth",)


@pytest.mark.parametrize("modality", ["", "RGB", "rgbd", "depth+rgb", "rgb+"])
def test_unknown_modality_is_refused(modality):
    config = paper("10-0")
    config.modality = modality
    with pytest.raises(UserError, match=r"config\.modality"):
        build("ib_iumad", config)


def test_unknown_method_is_refused():
    with pytest.raises(
        UserError,
        match=sentences.UNKNOWN_METHOD.format(
            found="patchcore", known="ib_iumad, uniad, iuf, simplenet, destseg, diad, cdad, feature"
        ),
    ):
        build("patchcore", paper("10-0"))


@pytest.mark.parametrize("target", ["", "fused", "rgb+depth"])
def test_unknown_target_is_refused(target):
    config = paper("10-0")
    config.model.target = target
    with pytest.raises(UserError, match=r"config\.model\.target"):
        build("ib_iumad", config)


@pytest.mark.parametrize(("name", "trained"), [("ib_iumad", True), ("feature_norm", False), ("memory_bank", False)])
def test_only_the_baselines_have_no_loss(name, trained):
    assert (build(name, paper("10-0")).loss is not None) == trained
