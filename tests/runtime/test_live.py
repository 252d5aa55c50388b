"""The live view: what is written, what TensorBoard reads, and what is said where there is no terminal."""

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
    """What a TensorBoard log holds: tag -> [(step, value)], read by the format of TFRecord."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data, found = io.BytesIO(path.read_bytes()), {}
    while head := data.read(12):  # length, checksum of it; then the record and its checksum
        event = Event.FromString(data.read(struct.unpack("<Q", head[:8])[0]))
        data.read(4)
        for value in event.summary.value:
            kind = value.image if value.HasField("image") else value.simple_value
            found.setdefault(value.tag, []).append((event.step, kind))
    return found


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def run(workdir, tensorboard):
    """Two epochs of a second step, and an evaluation."""
    view = Live(workdir, tensorboard)
    view.begin(1, ("ant", "bee"), 48)
    for epoch in (0, 1):
        view.epoch(1, epoch, 20, {**LOSSES, "loss": 0.75 / (1 + epoch)}, 1e-3, images=48, seconds=4.0)
    view.evaluation(1, "ant", "ib_iumad", {"i_auroc": 0.875, "p_auroc_object": float("nan")})
    picture = workdir / "heatmap.png"
    Image.fromarray(np.full((8, 6, 3), (200, 100, 50), np.uint8)).save(picture)
    view.picture(1, "ant", picture)
    view.close()


def test_every_event_is_a_line_with_the_time(tmp_path):
    for _ in range(2):  # a run that goes on adds to the file
        run(tmp_path, tensorboard=False)
    lines = ledger.read(tmp_path / "live.jsonl")
    assert [line["event"] for line in lines] == 2 * ["step", "epoch", "epoch", "evaluation"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert lines[0]["learned"] == ["ant", "bee"]
    assert {key: lines[2][key] for key in ("step", "epoch", "loss", "learning_rate", "images_per_second")} == {
        "step": 1, "epoch": 1, "loss": 0.375, "learning_rate": 1e-3, "images_per_second": 12.0
    }  # fmt: skip
    assert lines[3]["i_auroc"] == 0.875
    assert lines[3]["p_auroc_object"] is None
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_reads_the_same(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, tensorboard=True)
    found = events(tmp_path / "tensorboard")
    assert found["losses/loss"] == [(20, 0.75), (21, 0.375)]  # of 20 epochs per step
    assert found["learning_rate"] == [(20, pytest.approx(1e-3)), (21, pytest.approx(1e-3))]
    assert found["images_per_second"] == [(20, 12.0), (21, 12.0)]
    assert found["i_auroc/ant/ib_iumad"] == [(1, 0.875)]
    assert "p_auroc_object/ant/ib_iumad" not in found
    ((step, picture),) = found["heatmaps/ant"]
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert step == 1
    assert pixels.shape == (8, 6, 3)
    assert (pixels == (200, 100, 50)).all()


def test_tensorboard_does_not_bring_tensorflow(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, tensorboard=True)
    assert "tensorflow" not in sys.modules


def test_a_writer_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr(live, "find_spec", lambda name: None)
    live.check(tensorboard=False)
    with pytest.raises(UserError, match=sentences.TENSORBOARD_MISSING):
        live.check(tensorboard=True)


def test_without_a_terminal_a_line_now_and_then(tmp_path, capsys, clock):
    view = Live(tmp_path, tensorboard=False)
    view.begin(0, ("ant",), 24)
    for epoch in range(6):
        clock[0] += 11
        view.epoch(0, epoch, 60, LOSSES, 1e-3, images=24, seconds=11.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        sentences.STEP_BEGINS.format(step=0, objects="ant", images=24),
        sentences.EPOCH_DONE.format(step=0, epoch=3, epochs=60, loss=0.75, rate=2.18, minutes=10.4),  # 57 of 11 s
        sentences.EPOCH_DONE.format(step=0, epoch=6, epochs=60, loss=0.75, rate=2.18, minutes=9.9),
    ]


def test_on_a_terminal_the_bar_tells_of_epochs(tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    view = Live(tmp_path, tensorboard=False)
    clock[0] += 1000
    view.epoch(0, 0, 60, LOSSES, 1e-3, images=24, seconds=11.0)
    assert capsys.readouterr().err == ""
