"""Stable Diffusion's files: every layout gives the same parameters to the bit, and nothing else is accepted."""

import contextlib
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from iumad_jax.errors import UserError
from iumad_jax.models import stable_diffusion
from iumad_jax.models.stable_diffusion import Networks
from tests import sentences
from tests.models import pth
from tests.models.stable_diffusion_files import (
    CHANNELS,
    FOLDERS,
    LAYOUTS,
    NETWORKS,
    PREFIXES,
    UNET,
    ModelCheckpoint,
    as_folder,
    as_safetensors,
    cast,
    compvis,
    lightning,
    save_pickle,
    shapes,
    single_file,
)
from tests.oracle import inputs
from tests.oracle.inputs import TEXT

pytestmark = pytest.mark.usefixtures("compile_quickly")

PUBLISHED = {  # names in diffusers and in a single file
    "unet": {
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.resnets.1.time_emb_proj.weight": "input_blocks.2.0.emb_layers.1.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "down_blocks.3.resnets.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
        "mid_block.resnets.0.norm1.weight": "middle_block.0.in_layers.0.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.norm2.bias": "middle_block.2.out_layers.0.bias",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.attentions.0.norm.weight": "output_blocks.3.1.norm.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv1.weight": "output_blocks.11.0.in_layers.2.weight",
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.bias": (
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.bias"
        ),
        "conv_norm_out.weight": "out.0.weight",
        "conv_out.bias": "out.2.bias",
    },
    "autoencoder": {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.bias": "encoder.down.0.downsample.conv.bias",
        "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
        "decoder.mid_block.attentions.0.group_norm.bias": "decoder.mid.attn_1.norm.bias",
        "decoder.mid_block.resnets.1.conv1.weight": "decoder.mid.block_2.conv1.weight",
        "decoder.up_blocks.0.resnets.2.norm1.weight": "decoder.up.3.block.2.norm1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "post_quant_conv.weight": "post_quant_conv.weight",
    },
}


@pytest.mark.parametrize(("network", "count"), [("unet", 686), ("autoencoder", 248)])
def test_names_in_a_single_file(network, count):
    names = stable_diffusion.tensors(shapes(Networks())[network])
    translated = compvis(network, names)
    assert len(names) == len(set(translated.values())) == count
    for name, expected in PUBLISHED[network].items():
        assert translated[name] == PREFIXES[network] + expected


def test_names_of_the_autoencoders_attention_in_2022():
    """Compare with names in folders of that year."""
    layers = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn", "group_norm": "group_norm"}
    place = "decoder.mid_block.attentions.0."
    for layer, theirs in layers.items():
        assert stable_diffusion.autoencoder_name_of_2022(f"{place}{layer}.bias") == f"{place}{theirs}.bias"
    for name in ("encoder.mid_block.resnets.0.norm1.weight", "quant_conv.weight"):
        assert stable_diffusion.autoencoder_name_of_2022(name) == name


class Renamed(str):
    """A tensor that is its own name, for conversion by diffusers."""

    shape = ()

    def __getitem__(self, part):
        return self


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "autoencoder"])
def test_all_names_and_shapes_equal_those_of_diffusers(network):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils

    with torch.device("meta"):
        if network == "unet":
            model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
            convert = single_file_utils.convert_ldm_unet_checkpoint
        else:
            down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
            channels = (128, 256, 512, 512)
            model = diffusers.AutoencoderKL(
                down_block_types=down, up_block_types=up, block_out_channels=channels, layers_per_block=2
            )
            convert = single_file_utils.convert_ldm_vae_checkpoint
    tensors = stable_diffusion.tensors(shapes(Networks())[network])
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    file = {theirs: Renamed(name) for name, theirs in compvis(network, tensors).items()}
    assert convert(file, model.config) == {name: name for name in tensors}


@pytest.fixture(scope="module")
def states():
    """Return the tensors of the small networks by their names in diffusers."""
    return {
        network: inputs.state_dict({name: t.shape for name, t in stable_diffusion.tensors(params).items()})
        for network, params in shapes(NETWORKS).items()
    }


@pytest.fixture(scope="module")
def expected(states):
    """Return the same as our parameters."""
    return {
        network: {
            t.path: as_ours(states[network][name], t.path)
            for name, t in stable_diffusion.tensors(shapes(NETWORKS)[network]).items()
        }
        for network in states
    }


def as_ours(value, path):
    if path[-1] != "kernel":
        return value
    return np.transpose(value, (2, 3, 1, 0)) if value.ndim == 4 else value.T


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, np.float32) for layout in LAYOUTS),
        ("one file", np.float16),
        ("half", np.float16),
        ("checkpoint", np.float16),
        ("one file", jnp.bfloat16),
        ("2022", jnp.bfloat16),
    ],
)
def test_every_layout_gives_the_same_parameters_to_the_bit(tmp_path, states, expected, layout, dtype):
    path = str(LAYOUTS[layout](tmp_path, cast(states, dtype)))
    loaded = stable_diffusion.load(path, NETWORKS)
    assert set(loaded) == {"unet", "autoencoder", "context"}
    for network in ("unet", "autoencoder"):
        assert_same(loaded[network], expected[network], dtype)
    assert_same(stable_diffusion.load_autoencoder(path, NETWORKS.autoencoder), expected["autoencoder"], dtype)


def assert_same(params, expected, dtype=np.float32):
    flat = flatten_dict(params)
    assert flat.keys() == expected.keys()
    for path, value in flat.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[path].astype(dtype).astype(np.float32))


def test_context_is_that_of_the_empty_prompt(tmp_path, states):
    with np.load(Path(__file__).parents[1] / "oracle" / "goldens.npz") as goldens:
        context = goldens["text_encoder/context"]
    loaded = stable_diffusion.load(str(as_safetensors(tmp_path, states)), NETWORKS)["context"]
    assert loaded.shape == (77, TEXT["width"])
    np.testing.assert_allclose(loaded, context, atol=1e-4 * np.abs(context).max(), rtol=0)


def of_autoencoder_alone(states, trained):
    """Return the state dict of KL-f8, as trained or in the layout of diffusers."""
    if not trained:
        return states["autoencoder"]
    prefix = PREFIXES["autoencoder"]
    state = {name.removeprefix(prefix): x for name, x in single_file(states).items() if name.startswith(prefix)}
    return state | {
        "loss.logvar": np.array(0.5, np.float32),
        "loss.discriminator.main.3.num_batches_tracked": np.array(5),
    }


@pytest.mark.parametrize("trained", [True, False])
def test_autoencoder_alone(tmp_path, states, expected, trained):
    state = of_autoencoder_alone(states, trained)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.numpy.save_file(state, file)
    save_pickle(tmp_path / "kl-f8.ckpt", *lightning(state))
    for path in (file, tmp_path / "kl-f8.ckpt", tmp_path):
        assert_same(stable_diffusion.load_autoencoder(str(path), NETWORKS.autoencoder), expected["autoencoder"])
    with pytest.raises(UserError, match=sentences.TENSOR_MISSING.format(r"conv_in\.bias")):
        stable_diffusion.load(str(file), NETWORKS)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, states, expected):
    trace = tmp_path / "trace"
    content, storages = lightning(states["autoencoder"], str(trace))
    with contextlib.suppress(Exception):  # Python's own unpickler executes the command
        pickle.loads(content)
    assert trace.exists()
    trace.unlink()
    for write in (pth.zipped, pth.legacy):
        save_pickle(tmp_path / "kl-f8.ckpt", content, storages, write)
        loaded = stable_diffusion.load_autoencoder(str(tmp_path / "kl-f8.ckpt"), NETWORKS.autoencoder)
        assert_same(loaded, expected["autoencoder"])
    assert not trace.exists()


def test_files_written_by_diffusers_and_transformers(tmp_path, expected):
    pytest.importorskip("diffusers")
    from tests.oracle import make

    models = {"unet": make.unet_model(**UNET, cross=TEXT["width"]), "autoencoder": make.autoencoder_model(CHANNELS)}
    models["text_encoder"] = make.text_model()
    for network, model in models.items():
        make.seeded(model).save_pretrained(tmp_path / FOLDERS[network])
    loaded = stable_diffusion.load(str(tmp_path), NETWORKS)
    for network in ("unet", "autoencoder"):
        assert_same(loaded[network], expected[network])


def test_checkpoints_written_by_torch(tmp_path, states, expected):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(value)) for name, value in single_file(states).items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    content = {
        "epoch": 3,
        "callbacks": {ModelCheckpoint: ModelCheckpoint()},
        "optimizer_states": [optimizer.state_dict()],
    }
    torch.save(content | {"state_dict": state, "created": Path("x")}, tmp_path / "model.ckpt")
    loaded = stable_diffusion.load(str(tmp_path / "model.ckpt"), NETWORKS)
    for network in ("unet", "autoencoder"):
        assert_same(loaded[network], expected[network])


WRONG = {
    "missing": ("unet", "mid_block.attentions.0.proj_in.weight", None, sentences.TENSOR_MISSING),
    "of stable diffusion 2": (
        "unet",
        "mid_block.attentions.0.proj_in.weight",
        np.zeros((16, 16), np.float32),
        sentences.TENSOR_OF_WRONG_SHAPE.format(expected=r"\(16, 16, 1, 1\)", found=r"\(16, 16\)"),
    ),
    "for painting": (
        "unet",
        "conv_in.weight",
        np.zeros((8, 9, 3, 3), np.float32),
        sentences.TENSOR_OF_WRONG_SHAPE.format(expected=r"\(8, 4, 3, 3\)", found=r"\(8, 9, 3, 3\)"),
    ),
    "not finite": ("autoencoder", "quant_conv.bias", np.full(8, np.inf, np.float32), sentences.TENSOR_NOT_FINITE),
    "left over": ("autoencoder", "encoder.conv_more.bias", np.zeros(8, np.float32), sentences.TENSOR_UNKNOWN),
    "text encoder's": ("text_encoder", "final_layer_norm.bias", None, sentences.TENSOR_MISSING),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("layout", ["one file", "folder", "2022"])
def test_a_wrong_tensor_is_named(tmp_path, states, layout, wrong):
    network, name, value, message = WRONG[wrong]
    changed = states[network] | {name: value}
    changed = states | {network: {key: x for key, x in changed.items() if x is not None}}
    path = LAYOUTS[layout](tmp_path, changed)
    names = {"folder": {name: name}, "2022": {name: f"text_model.{name}" if network == "text_encoder" else name}}
    names["one file"] = compvis(network, states[network] | {name: value})
    with pytest.raises(UserError, match=message.format(names[layout][name].replace(".", r"\."))):
        stable_diffusion.load(str(path), NETWORKS)


def test_missing_files_are_named(tmp_path, states):
    as_folder(tmp_path, states)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=sentences.NO_WEIGHTS_IN_FOLDER.format("text_encoder", r"model\.safetensors")):
        stable_diffusion.load(str(tmp_path), NETWORKS)
    with pytest.raises(UserError, match="No such file"):
        stable_diffusion.load(str(tmp_path / "none.ckpt"), NETWORKS)
    with pytest.raises(UserError, match=sentences.NO_WEIGHTS_IN_FOLDER.format("text_encoder", "diffusion_pytorch")):
        stable_diffusion.load_autoencoder(str(tmp_path / "text_encoder"), NETWORKS.autoencoder)


def test_a_folder_of_a_single_file_is_told_which_one(tmp_path):
    (tmp_path / "v1-5-pruned.safetensors").touch()
    with pytest.raises(UserError, match=r"has no folder unet; name a file in it, .*v1-5-pruned\.safetensors"):
        stable_diffusion.load(str(tmp_path), NETWORKS)


def test_files_tell_what_is_read(tmp_path, states):
    as_folder(tmp_path, states)
    files = stable_diffusion.files(str(tmp_path))
    assert files["text_encoder"] == tmp_path / "text_encoder" / "model.safetensors"
    assert stable_diffusion.file_of_autoencoder(str(tmp_path)) == files["autoencoder"]
    assert set(stable_diffusion.files("v1-5-pruned.ckpt").values()) == {Path("v1-5-pruned.ckpt")}
