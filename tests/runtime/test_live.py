"""The live view: live.jsonl, TensorBoard, and log lines without a terminal."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from iumad_jax.errors import UserError
from iumad_jax.runtime import ledger, live
from iumad_jax.runtime.live import Live
from tests import sentences

LOSSES = {"loss": 0.75, "fusion": 0.5}


def events(folder):
    """Read a TensorBoard log, a TFRecord file, as tag -> [(step, value)]."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data, values_by_tag = io.BytesIO(path.read_bytes()), {}
    while head := data.read(12):  # length and its checksum; the record and its checksum follow
        event = Event.FromString(data.read(struct.unpack("<Q", head[:8])[0]))
        data.read(4)
        for value in event.summary.value:
            content = value.image if value.HasField("image") else value.simple_value
            values_by_tag.setdefault(value.tag, []).append((event.step, content))
    return values_by_tag


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that is advanced by hand."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def run(workdir, tensorboard):
    """Record two epochs of the second step and an evaluation."""
    view = Live(workdir, tensorboard)
    view.log_step(1, "learn", ("ant", "bee"), 48, {"train.epochs": 3})
    for epoch in (0, 1):
        view.log_epoch(1, epoch, 20, {**LOSSES, "loss": 0.75 / (1 + epoch)}, 1e-3, images=48, seconds=4.0)
    view.log_evaluation(1, "ant", "ib_iumad", {"i_auroc": 0.875, "p_auroc_object": float("nan")}, {})
    picture = workdir / "heatmap.png"
    Image.fromarray(np.full((8, 6, 3), (200, 100, 50), np.uint8)).save(picture)
    view.log_picture(1, "ant", picture)
    view.close()


def test_events_are_written_with_the_time(tmp_path):
    for _ in range(2):  # a resumed run appends to the file
        run(tmp_path, tensorboard=False)
    lines = ledger.read(tmp_path / "live.jsonl")
    assert [line["event"] for line in lines] == 2 * ["step", "epoch", "epoch", "evaluation"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert lines[0]["objects"] == ["ant", "bee"]
    assert {key: lines[2][key] for key in ("step", "epoch", "loss", "learning_rate", "images_per_second")} == {
        "step": 1, "epoch": 1, "loss": 0.375, "learning_rate": 1e-3, "images_per_second": 12.0
    }  # fmt: skip
    assert lines[3]["i_auroc"] == 0.875
    assert lines[3]["p_auroc_object"] is None
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_shows_the_events(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, tensorboard=True)
    logged = events(tmp_path / "tensorboard")
    assert logged["losses/loss"] == [(20, 0.75), (21, 0.375)]  # with 20 epochs per step
    assert logged["learning_rate"] == [(20, pytest.approx(1e-3)), (21, pytest.approx(1e-3))]
    assert logged["images_per_second"] == [(20, 12.0), (21, 12.0)]
    assert logged["i_auroc/ant/ib_iumad"] == [(1, 0.875)]
    assert "p_auroc_object/ant/ib_iumad" not in logged
    ((step, picture),) = logged["heatmaps/ant"]
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert step == 1
    assert pixels.shape == (8, 6, 3)
    assert (pixels == (200, 100, 50)).all()


def test_tensorboard_does_not_import_tensorflow(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, tensorboard=True)
    assert "tensorflow" not in sys.modules


def test_a_missing_tensorboard_writer_is_reported(monkeypatch):
    monkeypatch.setattr(live, "find_spec", lambda name: None)
    live.check(tensorboard=False)
    with pytest.raises(UserError, match=sentences.TENSORBOARD_MISSING):
        live.check(tensorboard=True)


def test_epochs_are_logged_at_intervals_without_a_terminal(tmp_path, capsys, clock):
    view = Live(tmp_path, tensorboard=False)
    view.log_step(0, "learn", ("ant",), 24, {})
    for epoch in range(6):
        clock[0] += 11
        view.log_epoch(0, epoch, 60, LOSSES, 1e-3, images=24, seconds=11.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        sentences.STEP_BEGINS.format(step=0, objects="ant", images=24),
        sentences.EPOCH_DONE.format(
            step=0, epoch=3, epochs=60, loss=0.75, rate=2.18, minutes=10.4
        ),  # 57 epochs of 11 s
        sentences.EPOCH_DONE.format(step=0, epoch=6, epochs=60, loss=0.75, rate=2.18, minutes=9.9),
    ]


def test_epochs_are_not_logged_on_a_terminal(tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    view = Live(tmp_path, tensorboard=False)
    clock[0] += 1000
    view.log_epoch(0, 0, 60, LOSSES, 1e-3, images=24, seconds=11.0)
    assert capsys.readouterr().err == ""
