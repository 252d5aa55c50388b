"""Scheduler of the GPU command with parts that fail in every way. It depends on no version of jax."""

import json
import os
import time

import psutil
import pytest

from kernels.benchmarks.gpu.__main__ import main
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
    parts["first"] = (1, ["raises", "works", "new"])
    code, files, measured = call(**parts)
    assert (code, measured) == (0, ["new", "raises"])  # rows that failed come last
    assert files["first"]["rows"]["raises"]["value"] == 1
    code, files, measured = call(**parts)
    assert (code, measured) == (0, [])
    assert [files[name]["state"] for name in parts] == ["done", "done"]


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


def test_other_parts_survive_a_module_that_cannot_be_loaded(call, capfd):
    code, files, measured = call(first=(1, None), second=(1, ["other"]))
    assert (code, measured) == (1, ["other"])
    assert list(files) == ["second"]
    error_output = capfd.readouterr().err
    assert sentences.PART_ENDED.format(part="first", code=1) in error_output
    assert "SyntaxError" in error_output
