"""GPU command: a rehearsal on a CPU, and the scheduler with parts that fail in every way."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from iumad_kernels.selective_scan import pallas_mosaic
from jax.experimental.pallas import mosaic_gpu

from kernels.benchmarks import selective_scan
from kernels.benchmarks.gpu import scan
from kernels.benchmarks.gpu.__main__ import PARTS, main
from kernels.benchmarks.gpu.scheduler import Part
from tests import sentences

pytestmark = pytest.mark.slow

PART = """
import os, signal, subprocess, sys, time
from pathlib import Path

def cases(options):
    for key in {keys}:
        yield key, lambda key=key: measure(options, key)

def measure(options, key):
    with (Path(options.out).parent / "measured").open("a") as file:
        print(key, file=file)
    if key == "raises" and not os.environ.get("MENDED"):
        raise ValueError("boom")
    if key == "dies" and not os.environ.get("MENDED"):
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (Path(options.out).parent / "child").write_text(str(child.pid))
        time.sleep(600)
    return {{"value": 1}}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call the command with fake parts: (minutes, **{name: (share, keys)}) -> exit code, files, measured keys."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    out, measured = tmp_path / "out", tmp_path / "measured"

    def call(minutes=1.0, **parts):
        measured.write_text("")
        for name, (_, keys) in parts.items():
            (tmp_path / f"fake_{name}.py").write_text("no python" if keys is None else PART.format(keys=keys))
        made_parts = {name: Part(f"fake_{name}", share) for name, (share, _) in parts.items()}
        code = main([f"--out={out}", f"--minutes={minutes}", "--rehearse"], made_parts)
        return code, {file.stem: json.loads(file.read_text()) for file in out.iterdir()}, measured.read_text().split()

    return call


def test_other_rows_survive_a_row_that_raises_which_is_tried_again(call, monkeypatch, capsys):
    parts = {"first": (1, ["raises", "works"]), "second": (1, ["other"])}
    code, files, measured = call(**parts)
    assert (code, measured) == (1, ["raises", "works", "other"])
    assert files["first"]["rows"]["raises"]["error"] == "ValueError: boom"
    assert files["first"]["rows"]["works"]["value"] == 1
    assert [files[name]["state"] for name in parts] == ["incomplete", "done"]
    error_output = capsys.readouterr().err
    assert sentences.PART_INCOMPLETE.format("first") in error_output
    assert error_output.endswith(
        sentences.PART_OF_FAILED_ROWS.format(done=1, failed=1, row="raises", error="ValueError: boom") + "\n"
    )

    monkeypatch.setenv("MENDED", "1")
    code, files, measured = call(**parts)
    assert (code, measured) == (0, ["raises"])
    assert files["first"]["rows"]["raises"]["value"] == 1
    assert call(**parts)[2] == []


def test_other_rows_and_parts_survive_a_killed_process(call):
    code, files, measured = call(first=(1, ["works", "dies", "after"]), second=(1, ["other"]))
    assert (code, measured) == (1, ["works", "dies", "after", "other"])
    assert files["first"]["rows"]["dies"]["error"] == sentences.ROW_NOT_FINISHED
    assert files["first"]["rows"]["after"]["value"] == 1
    assert files["first"]["state"] == "incomplete"
    assert files["second"]["state"] == "done"


def test_a_part_out_of_time_is_killed_with_its_children(call, tmp_path):
    code, files, measured = call(0.3, first=(1, ["works", "hangs"]), second=(1, ["other"]))
    assert (code, measured) == (1, ["works", "hangs", "other"])
    assert files["first"]["state"] == "out of time"
    assert files["first"]["rows"]["works"]["value"] == 1
    assert files["first"]["rows"]["hangs"]["error"] == sentences.ROW_NOT_FINISHED
    assert files["second"]["state"] == "done"
    end = time.monotonic() + 10
    child = int((tmp_path / "child").read_text())
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_row_that_hangs_leaves_time_for_the_others(call):
    code, files, measured = call(0.4, first=(1, ["hangs", "after", "works"]))
    assert (code, measured) == (1, ["hangs", "after", "works"])
    assert files["first"]["state"] == "incomplete"
    assert list(files["first"]["rows"]) == ["hangs", "after", "works"]
    assert list(call(0.1, first=(1, ["hangs", "later"]))[2]) == ["later", "hangs"]  # rows that failed come last


def test_other_parts_survive_a_module_that_cannot_be_loaded(call, capfd):
    code, files, measured = call(first=(1, None), second=(1, ["other"]))
    assert (code, measured) == (1, ["other"])
    assert list(files) == ["second"]
    error_output = capfd.readouterr().err
    assert sentences.PART_ENDED.format(part="first", code=1) in error_output
    assert "SyntaxError" in error_output


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


def test_rehearsal(tmp_path):
    """Run every part twice; the second call has nothing to do."""
    arguments = [f"--out={tmp_path}", "--minutes=9", "--rehearse"]
    assert main(arguments) == 0
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
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
    assert main(arguments) == 0
    second_files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert {name: content["rows"] for name, content in second_files.items()} == rows
    assert {content["state"] for content in second_files.values()} == {"done"}
