"""GPU command: a rehearsal on a CPU, and invalid calls."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan import pallas_mosaic
from jax.experimental.pallas import mosaic_gpu

from kernels.benchmarks import selective_scan
from kernels.benchmarks.gpu import scan
from kernels.benchmarks.gpu.__main__ import PARTS, main
from kernels.benchmarks.gpu.worker import Options, work
from tests import sentences

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes_compile_quickly")]


def test_invalid_calls_are_explained(tmp_path, capfd):
    out = tmp_path / "out"
    assert main([f"--out={out}", "--parts=a"]) == 2
    assert capfd.readouterr().err == sentences.NO_GPU + "\n"
    assert not out.exists()
    for arguments, message in {
        "--parts=h": sentences.UNKNOWN_PART.format(
            found="h", range="a to g", known="correctness, scan, update, profile, training, prediction, methods"
        ),
        "--minutes=0": sentences.MINUTES_WRONG.format(0),
        "--minutes=abc": sentences.MINUTES_WRONG.format("abc"),
        f"--data={tmp_path}": sentences.EYECANDIES_MISSING.format(folder=tmp_path, example="CandyCane"),
    }.items():
        with pytest.raises(SystemExit) as exit_:
            main([f"--out={out}", arguments])
        assert exit_.value.code == 2
        assert message in capfd.readouterr().err
    (tmp_path / "file").touch()
    assert main([f"--out={tmp_path / 'file' / 'out'}", "--rehearse", "--parts=a"]) == 2
    assert capfd.readouterr().err.endswith(
        sentences.OUT_NOT_WRITTEN.format(folder="out", reason="Not a directory") + "\n"
    )


def test_a_folder_of_other_results_is_refused(tmp_path, capsys):
    file = tmp_path / "scan.json"
    for content, message in {
        "[]": sentences.NO_RESULTS_OF_COMMAND.format(file),
        '{"part": "scan", "rehearsal": false, "state": "", "tried": [], "machines": [], "rows": {}}': (
            sentences.RESULTS_WITHOUT_REHEARSAL.format(file)
        ),
    }.items():
        file.write_text(content)
        assert main([f"--out={tmp_path}", "--rehearse", "--parts=scan"]) == 2
        assert capsys.readouterr().err.startswith(f"--out: {message}")
        assert file.read_text() == content


def test_the_requested_number_of_segments_is_used(monkeypatch):
    """By default, 2 sequences of one block with 256 positions are cut into 4 segments of 64, the minimum."""
    numbers = []  # of segments
    segments = pallas_mosaic._number_of_segments
    monkeypatch.setattr(
        pallas_mosaic, "_number_of_segments", lambda x, B: numbers.append(segments(x, B)) or numbers[-1]
    )
    args = selective_scan.random_inputs((2, 256, 8, 1, 1), jnp.float32)
    for number in scan.SEGMENTS:
        jax.eval_shape(lambda args: jax.vjp(lambda args: scan.scan_in_segments(number, **args), args)[0], args)  # noqa: B023
    assert numbers == [1, 4]
    assert pallas_mosaic.PROCESSORS == 132


def test_rehearsal(tmp_path, monkeypatch):
    """Run every part twice; the second time has nothing to do."""
    assert main([f"--out={tmp_path}", "--minutes=9", "--rehearse"]) == 0
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert {content["state"] for content in files.values()} == {"done"}
    assert len(list(tmp_path.iterdir())) == len(PARTS) <= 8
    for content in files.values():
        (machine,) = content["machines"]
        assert machine["versions"]["jax"] == jax.__version__
        assert sentences.CPU_CORES in machine["device"]
    rows = {name: content["rows"] for name, content in files.items()}
    kernel = "mosaic" if hasattr(mosaic_gpu, "InterpretGPUParams") else "xla"
    assert all(row["implementation"] == kernel and row["bit-equal"] for row in rows["correctness"].values())
    assert rows["scan"]["mamba-ssm"]["left_out"] == sentences.NEEDS_GPU
    assert all(len(timed_row["seconds"]) == 3 for row in rows["scan"].values() for timed_row in row.get("timed", []))
    assert f"1x5x4x2x1 {kernel}" in rows["scan"]
    assert rows["update"][f"{kernel}, TF32"]["compile_seconds"] > 0
    assert len(rows["profile"]["xla, TF32"]["hottest"]) == 5
    assert rows["training"]["candies"]["epochs"] == 2
    assert "| CandyCane |" in rows["training"]["candies"]["results"]
    assert np.isfinite(rows["prediction"]["batch 1"]["ms"])
    monkeypatch.setattr(pallas_mosaic, "interpret", None)  # a rehearsal changes it
    for name, part in PARTS.items():
        assert work(part.module, name, Options(str(tmp_path), str(tmp_path), None, rehearse=True, seconds=60)) == 0
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"] == rows[name]
