"""UniAD in PyTorch computes what ours does, and is not timed if it does not."""

import importlib.util
import json
import re

import jax
import numpy as np
import pytest

from iumad_jax import methods
from kernels.benchmarks import pytorch_uniad as command
from kernels.benchmarks import tables, training_step
from tests import sentences

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]

NUMBER = r"[\d.e+-]+"


@pytest.fixture
def networks():
    torch = pytest.importorskip("torch", reason=sentences.PYTORCH_MISSING)
    threads = torch.get_num_threads()
    yield importlib.import_module("kernels.benchmarks.pytorch_networks")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("standardise", [True, False], ids=["z-scores", "features"])
def test_gradients_agree(networks, standardise):
    import torch

    config = training_step.CONFIGS["quickstart"].get_config()
    changes = {"method": "uniad", "modality": "rgb+depth", "model.dropout": 0.0, "model.jitter.probability": 0.0}
    config.update_from_flattened_dict(command.SMALL | changes | {"model.standardise": standardise})
    method, batch = methods.build(config.method, config), training_step.random_batch(config)
    variables = command.random_variables(config)

    def loss(params):
        return method.loss(variables | {"params": params}, batch, jax.random.split(jax.random.key(0), 2)).total

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    network = networks.load(networks.UniAD(config, training_step.CHANNELS), variables)
    network.loss(jax.tree.map(torch.tensor, batch.features)).backward()
    expected = networks.load(networks.UniAD(config, training_step.CHANNELS), variables | {"params": gradients})
    for (name, ours), weight in zip(expected.named_parameters(), network.parameters(), strict=True):
        ours, theirs = ours.detach().numpy(), weight.grad.numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-6, err_msg=name)


def no_compiler(_):
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nand more")


@pytest.mark.parametrize("compiler", [lambda function: function, no_compiler], ids=["compiler", "no compiler"])
def test_the_command_prints_and_writes_rows(networks, compiler, monkeypatch, tmp_path, capsys):
    """Compiling takes minutes, so it is replaced."""
    monkeypatch.setattr(networks.torch, "compile", compiler)
    file = tmp_path / "out.json"
    assert command.main(["--small", "--seconds=0", f"--json={file}"]) == 0
    out = capsys.readouterr().out
    result = json.loads(file.read_text())
    left_out = (
        {command.COMPILED: "InvalidCxxCompiler: No working C++ compiler found"} if compiler is no_compiler else {}
    )
    assert result["left_out"] == left_out
    for name, reason in left_out.items():
        assert out.startswith(sentences.PEER_LEFT_OUT.format(peer=name, reason=reason) + "\n")
    times = rf"{NUMBER} \| {NUMBER} \| {'not available' if left_out else NUMBER} \| {NUMBER} \| 3 \|"
    assert re.search(rf"^\| quickstart, training update, batch size 2 \| {times}$", out, re.MULTILINE), out
    assert re.search(rf"^\| quickstart, prediction of one image \| {times}$", out, re.MULTILINE), out
    assert f"torch {networks.torch.__version__}" in out
    assert out.endswith(tables.file_tables(result) + "\n")
    assert list(result["differences"]) == ["error map", *(f"loss in update {i}" for i in range(1, 5))]
    assert all(difference < 1e-5 for difference in result["differences"].values())


def without_mask(networks, monkeypatch):
    monkeypatch.setattr(networks, "neighbour_mask", lambda grid: networks.torch.ones(grid**2, grid**2).bool())


def another_weight(networks, monkeypatch):
    load = networks.load

    def changed(network, variables):
        load(network, variables).reconstruction.rgb.encoder[0].norm_1.bias.data[0] += 1
        return network

    monkeypatch.setattr(networks, "load", changed)


def another_rate(networks, monkeypatch):
    optimizer = networks.torch.optim.AdamW
    monkeypatch.setattr(networks.torch.optim, "AdamW", lambda groups, lr, fused: optimizer(groups, lr=1.1 * lr))


WRONG = {without_mask: "error map", another_weight: "error map", another_rate: "loss in update 2"}


@pytest.mark.parametrize("change", WRONG)
def test_another_network_or_optimiser_is_not_timed(networks, change, monkeypatch, tmp_path, capsys):
    change(networks, monkeypatch)
    file = tmp_path / "out.json"
    assert command.main(["--small", "--seconds=0", f"--json={file}"]) == 1
    assert not file.exists()
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(sentences.PYTORCH_DIFFERS.format(what=WRONG[change], number=NUMBER, most="1e-04"), err), err


def test_without_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["--small"]) == 2
    assert capsys.readouterr().err == sentences.PYTORCH_MISSING + "\n"
