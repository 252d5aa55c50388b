"""The benchmark on what runs here: it checks before it times, and refuses to time what is wrong."""

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
    monkeypatch.setattr(command, "CHECKED", ["1x3x4x2x2"])
    command.compiled_results.clear_cache()  # as another test may have put another scan in its place
    return command


def run(benchmark, folder):
    code = benchmark.main(["--shapes=1x5x4x2x1", "--seconds=0", f"--json={folder / 'out.json'}"])
    return code, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("names", [["xla"], ["xla", "mosaic"]], ids="-".join)
def test_checks_then_times(benchmark, names, request, tmp_path):
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


def test_says_which_peers_are_left_out(benchmark, capsys, tmp_path):
    run(benchmark, tmp_path)
    expected = [
        sentences.PEER_LEFT_OUT.format(peer=peer, reason=sentences.NEEDS_GPU)
        for peer in ("jax-linear-attention", "mamba-ssm")
    ]
    assert capsys.readouterr().out.splitlines()[:2] == expected


def test_leaves_out_peers_that_are_not_installed(benchmark, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found, left_out = benchmark.peers()
    assert found == {}
    assert left_out == {"jax-linear-attention": "No module named 'jla'", "mamba-ssm": "No module named 'torch'"}


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
    said = capsys.readouterr().err
    assert said == sentences.KERNEL_WRONG.format(kernel="xla", shape="1x3x4x2x2", why=message) + "\n"


@pytest.mark.parametrize("shape", ["ed2s", "4x196x512x16", "4x196x512x16x-1", "0x1x1x1x1"])
def test_says_what_a_shape_is(benchmark, shape, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main([f"--shapes={shape}"])
    assert exit_.value.code == 2
    assert (
        sentences.SHAPE_UNKNOWN.format(found=shape, known="target, es2d, long, wide", example="24x196x")
        in capsys.readouterr().err
    )
