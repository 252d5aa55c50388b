"""The plan of a run: what is read back, and what is refused."""

import json
import shutil

import pytest
from PIL import Image

from iumad_jax import protocol
from iumad_jax.config import small
from iumad_jax.data import plan
from iumad_jax.errors import UserError
from iumad_jax.runtime import workdir as workdirs
from tests import sentences

STEPS = protocol.steps("2-1", ("bolt", "nut", "washer"))
LATER = protocol.next_step(STEPS, ("anchor",), {"dataset.root": "later", "train.epochs": 3})


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan.write(tmp_path, [*STEPS, LATER])
    assert plan.read(tmp_path) == (*STEPS, LATER)
    assert plan.read(tmp_path / "elsewhere") == ()


def learn(objects, **fields):
    return {"act": "learn", "objects": objects, "changes": {}, "images": {}} | fields


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"[3]",
        b"\xff",
        *(
            json.dumps(entries).encode()
            for entries in (
                [learn([])],
                [learn("abc")],
                [learn([1])],
                [learn(["bolt", "bolt"])],
                [learn(["bolt"]), learn(["bolt"])],
                [{"act": "learn", "objects": ["bolt"], "changes": {}}],
                [learn(["bolt"], changes={"dataset.root": 3})],
                [learn(["bolt"], changes={"model.width": 3})],
                [learn(["bolt"], changes={"train.unknown": 3})],
                [learn(["bolt"], act="forget")],
                [learn(["bolt"], act="retire")],
                [learn(["bolt"]), learn(["bolt"], act="update", images={"bolt": {"train": {"0": 3}}})],
            )
        ),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=sentences.PLAN_DAMAGED.format(r".*plan\.json")):
        plan.read(tmp_path)


def test_a_closed_protocol_is_planned_whole_and_other_steps_when_they_begin(tmp_path):
    steps = (*STEPS, LATER)
    plan.begin(small("2-1"), tmp_path, STEPS, STEPS[0])
    assert plan.read(tmp_path) == STEPS
    plan.begin(small("2-1"), tmp_path, steps, STEPS[1])
    assert plan.read(tmp_path) == STEPS
    plan.begin(small("2-1"), tmp_path, steps, LATER)
    assert plan.read(tmp_path) == steps


def test_an_open_protocol_is_planned_step_by_step(tmp_path):
    steps = protocol.steps("open", ("bolt", "nut"))
    for step in steps:
        plan.begin(small("open"), tmp_path, steps, step)
        assert plan.read(tmp_path) == steps[: step.index + 1]


def test_steps_that_another_process_has_added_are_kept(tmp_path):
    plan.write(tmp_path, [*STEPS, LATER])
    mine = (*STEPS, protocol.next_step(STEPS, ("screw",), {}))
    with pytest.raises(UserError, match="another process has added steps"):
        plan.begin(small("2-1"), tmp_path, mine, mine[-1])
    assert plan.read(tmp_path) == (*STEPS, LATER)


def test_objects_learned_by_name_are_among_those_that_a_model_is_used_on(tmp_path):
    """The config selects bolt alone, and nut was learned later; its images may be gone."""
    for name in ("bolt", "nut"):
        image = tmp_path / "objects" / name / "train/good/rgb/0.png"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(image)
    config = small("open")
    config.modality = "rgb"
    config.dataset.update(name="folder", root=str(tmp_path / "objects"), objects="bolt")
    with workdirs.claimed(tmp_path / "run", config):
        plan.write(tmp_path / "run", protocol.steps("open", ("bolt", "nut")))
    config.dataset.trust = str(tmp_path)  # which makes it no other dataset
    for names in (("bolt", "nut"), ("bolt",)):
        assert plan.open_for_use(config, tmp_path / "run", 1).objects == names
        shutil.rmtree(tmp_path / "objects/nut", ignore_errors=True)
