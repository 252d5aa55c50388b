"""Benchmark of the selective scan: implementations are checked before they are timed, wrong ones are refused."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from iumad_kernels import selective_scan

from kernels.benchmarks import selective_scan as command
from tests import sentences

pytestmark = pytest.mark.slow


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(command, "CHECKED_SHAPES", ["1x3x4x2x2"])
    command.compiled_results.clear_cache()  # another test may have replaced the scan
    return command


def run(benchmark, folder):
    code = benchmark.main(["--shapes=1x5x4x2x1", "--seconds=0", f"--json={folder / 'out.json'}"])
    return code, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("names", [["xla"], ["xla", "mosaic"]], ids="-".join)
def test_implementations_are_checked_and_timed(benchmark, names, request, tmp_path):
    if "mosaic" in names:
        request.getfixturevalue("interpreted")
    code, result = run(benchmark, tmp_path)
    assert code == 0
    assert list(result["errors"]) == names
    for implementation in names:
        errors = result["errors"][implementation]["1x3x4x2x2"]
        assert len(errors) == 11
        assert all(0 <= error < 1e-5 for error in errors.values())
    assert [row["name"] for row in result["rows"][::2]] == [*names, "lax.scan", "associative_scan"]
    assert all(len(row["seconds"]) == 3 and row["disagreement"] < 1e-5 for row in result["rows"])


def test_peers_that_are_left_out_are_reported(benchmark, capsys, tmp_path):
    run(benchmark, tmp_path)
    expected = [
        sentences.PEER_LEFT_OUT.format(peer=peer, reason=sentences.NEEDS_GPU)
        for peer in ("jax-linear-attention", "mamba-ssm")
    ]
    assert capsys.readouterr().out.splitlines()[:2] == expected


def test_peers_that_are_not_installed_are_left_out(benchmark, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    available, left_out = benchmark.peers()
    assert available == {}
    missing = "mamba_ssm" if importlib.util.find_spec("torch") else "torch"
    assert left_out == {"jax-linear-attention": "No module named 'jla'", "mamba-ssm": f"No module named '{missing}'"}


WRONG = {
    sentences.GRADIENT_DIFFERS.format(name="D", found=1, most="1e-04"): lambda D: 2 * D - jax.lax.stop_gradient(D),
    sentences.GRADIENT_DIFFERS.format(name="x", found="nan", most="1e-04"): lambda D: D + jnp.nan,
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_kernel_is_not_timed(benchmark, message, monkeypatch, tmp_path, capsys):
    def wrong(D, implementation, **args):
        D = D if implementation == "reference" else WRONG[message](D)
        return selective_scan(D=D, implementation=implementation, **args)

    monkeypatch.setattr(benchmark, "selective_scan", wrong)
    code, result = run(benchmark, tmp_path)
    assert code == 1
    assert result["rows"] == []
    assert len(result["errors"]["xla"]["1x3x4x2x2"]) == 11
    error_output = capsys.readouterr().err
    assert error_output == sentences.KERNEL_WRONG.format(kernel="xla", shape="1x3x4x2x2", why=message) + "\n"


@pytest.mark.parametrize("shape", ["ed2s", "4x196x512x16", "4x196x512x16x-1", "0x1x1x1x1"])
def test_an_invalid_shape_is_explained(benchmark, shape, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main([f"--shapes={shape}"])
    assert exit_.value.code == 2
    assert (
        sentences.SHAPE_UNKNOWN.format(found=shape, known="target, es2d, long, wide", example="24x196x")
        in capsys.readouterr().err
    )
