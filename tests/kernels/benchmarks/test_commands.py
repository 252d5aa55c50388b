"""Further benchmark commands, each at its smallest size."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.benchmarks import tables, training_step
from tests import sentences

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NUMBER = r"[\d.e+-]+"


def run(command, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"kernels.benchmarks.{command}", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.usefixtures("compile_quickly")
def test_training_step(capsys):
    assert training_step.main(["--small", "--seconds=0"]) == 0
    expected = sentences.TRAINING_STEP_TIMED.format(system="quickstart", batch=2, number=NUMBER) + r"\n"
    assert re.fullmatch(expected, out := capsys.readouterr().out), out


def test_compile_selective_scan():
    if importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin"):
        process = run("compile_selective_scan", "1,8,32,4,1", "float32")
        assert process.returncode == 0, process.stderr
        assert re.search(sentences.MEMORY_COMPILED.format(number=r"[\d.]+"), process.stdout, re.MULTILINE)
    else:
        process = run("compile_selective_scan")
        assert process.returncode == 2
        assert process.stderr.startswith(sentences.CUDA_PLUGIN_MISSING.format("jax-cuda13-plugin"))


@pytest.mark.parametrize("file", ["cpu_py311", "cpu_py312"])
def test_tables_in_the_readme_match_the_results(file, capsys):
    assert tables.main([str(ROOT / "kernels" / "benchmarks" / "results" / f"{file}.json")]) == 0
    _, _, table = capsys.readouterr().out.partition("\n\n")
    assert table.strip() in (ROOT / "kernels" / "README.md").read_text()


def test_tables_of_parts(capsys):
    row = {"ms": 1.25, "peak": None, "hottest": [{"kernel": "k", "ms an update": 1.0}], "results": "two\nlines"}
    table = tables.part_table({"mosaic": row, "xla": {"error": "ValueError: no"}})
    expected = ["|  | ms | peak | error |", "| mosaic | 1.25 |  |  |", "| xla |  |  | ValueError: no |"]
    assert [line for line in table.splitlines() if line in expected] == expected
    assert sentences.HOTTEST.format("mosaic") + "\n\n| kernel | ms an update |\n| --- | --- |\n| k | 1 |" in table
    assert table.endswith(sentences.RESULTS_OF_PART.format("mosaic") + "\n\ntwo\nlines")


def test_share_of_the_floor():
    """For 1,024 elements x 16 states, 20 exponentials each at 1e9 per second take 20.5 us, the bytes 1.2 us."""
    row = {"shape": [1, 32, 32, 16, 1], "dtype": "float32", "pass": "forward", "name": "xla", "seconds": [40.96e-6] * 3}
    rates = {"bytes_per_second": 1e10, "special_functions_per_second": 1e9}
    assert tables.floor(row, rates) == pytest.approx(20.48e-6)
    assert tables.floor(row | {"pass": "forward + backward"}, rates) == pytest.approx(20.48e-6 + 36.864e-6)
    assert tables.floor(row, rates | {"bytes_per_second": 1e6}) == pytest.approx(12_288e-6)
    assert tables.floor(row, rates | {"bytes_per_second": None}) is None
    assert tables.scan_table([row], rates).splitlines()[-1].endswith("| 0.041 | ? | 50% |")


def test_a_file_without_results_is_refused(tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text("{}")
    assert tables.main([str(file)]) == 2
    assert (
        capsys.readouterr().err == sentences.NO_RESULTS_OF_BENCHMARK.format(file=file, reason="KeyError('rows')") + "\n"
    )
