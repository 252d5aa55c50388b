"""Files of Stable Diffusion in every layout, with small networks."""

import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from iumad_jax.models import stable_diffusion
from iumad_jax.models.autoencoder_kl import AutoencoderKL
from iumad_jax.models.diffusion import Sizes, UNet
from iumad_jax.models.stable_diffusion import Networks
from iumad_jax.models.text_encoder import EMPTY_PROMPT, TextEncoder
from tests.models import pth
from tests.oracle.inputs import GROUPS, HEADS, TEXT

UNET = {"channels": (8, 16), "blocks": 1, "attending": (0,)}
CHANNELS = 8, 16  # of the autoencoder
NETWORKS = Networks(
    UNet(Sizes(**UNET, heads=HEADS, groups=GROUPS)), AutoencoderKL(CHANNELS, groups=GROUPS), TextEncoder(**TEXT)
)
PREFIXES = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model."}
FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}


def shapes(networks):
    unet, autoencoder, text_encoder = networks
    context = jnp.zeros((77, text_encoder.width))
    key = jax.random.key(0)
    initialised = {
        "unet": jax.eval_shape(unet.init, key, jnp.zeros((16, 16, 4)), 0, context),
        "autoencoder": jax.eval_shape(autoencoder.init, key, jnp.zeros((64, 64, 3))),
        "text_encoder": jax.eval_shape(text_encoder.init, key, EMPTY_PROMPT),
    }
    return {name: variables["params"] for name, variables in initialised.items()}


def compvis(network, names):
    """Return the names in a single file by those in diffusers."""
    translate = {
        "unet": stable_diffusion.compvis_unet_name,
        "autoencoder": stable_diffusion.compvis_autoencoder_name,
        "text_encoder": lambda name, names: f"cond_stage_model.transformer.text_model.{name}",
    }[network]
    return {name: PREFIXES.get(network, "") + translate(name, names) for name in names}


def single_file(states):
    """Return the tensors of a single file, with those that are not used."""
    state = {
        theirs: states[network][name]
        for network in states
        for name, theirs in compvis(network, states[network]).items()
    }
    for name, value in state.items():
        if ".mid.attn_1." in name and value.ndim == 2:
            state[name] = value[..., None, None]
    one = np.ones(3, np.float32)
    return state | {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
        "model_ema.decay": np.array(0.5, np.float32),
        "model_ema.num_updates": np.array(3, np.int32),
        "model_ema.diffusion_modeltime_embed0weight": one,
        "betas": one,
        "alphas_cumprod_prev": one,
        "sqrt_one_minus_alphas_cumprod": one,
        "posterior_mean_coef1": one,
        "logvar": one,
        "scale_factor": np.array(0.18215, np.float32),
    }


KINDS = {np.float32: "Float", np.float16: "Half", jnp.bfloat16: "BFloat16", np.int64: "Long", np.int32: "Int"}


def pickled(state):
    """Return the pickle of a state dict without head and end, and its storages."""
    kinds = {np.dtype(dtype): kind for dtype, kind in KINDS.items()}
    views, storages = {}, {}
    for key, (name, value) in enumerate(state.items()):
        strides = tuple(stride // value.itemsize for stride in np.ascontiguousarray(value).strides)
        storage = pth.storage(str(key), value.size, f"torch\n{kinds[value.dtype]}Storage")
        views[name] = pth.tensor(storage, 0, value.shape, strides[-value.ndim :] if value.ndim else ())
        storages[str(key)] = value.tobytes()
    return pth.state_dict(**views)[len(pth.HEAD) : -1], storages


class ModelCheckpoint:
    """What Lightning stores of a callback."""

    def __init__(self):
        self.best = 0.5


class Harmful:
    """An object that is pickled as a command of the shell."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def lightning(state, trace=""):
    """Return the content of a checkpoint that Lightning writes; unpickled by Python, it creates the file `trace`."""
    content, storages = pickled(state)

    def body(value):
        return pickle.dumps(value, 2)[2:-1]

    moments = b"}(" + pth.number(0) + pth.tensor(pth.storage("moments", 3), 0, (3,), (1,)) + b"u"
    groups = [{"lr": 1e-5, "betas": (0.9, 0.999), "params": [0, 1]}]
    entries = {
        "epoch": pth.number(840),
        "callbacks": body({ModelCheckpoint: {"best": np.float64(0.5), "path": Path("best")}, "x": ModelCheckpoint()}),
        "harmful": body([Harmful(f"touch {trace}")]) if trace else b"N",
        "optimizer_states": body([{"state": {3: None}, "param_groups": groups}, {1, 2}, b"bytes"]),
        "moments": moments,
        "state_dict": content,
        "hyper_parameters": b"ccollections\ndefaultdict\n)R(" + pth.text("a") + pth.number(1) + b"u",
        "list": b"cmodule\nList\n)R(" + pth.number(1) + pth.number(2) + b"e",
    }
    items = b"".join(pth.text(name) + value for name, value in entries.items())
    return pth.HEAD + b"}(" + items + b"u.", {"moments": bytes(12)} | storages


def save_pickle(path, content, storages, write=pth.zipped):
    path.write_bytes(write(content, storages))


def cast(states, dtype):
    return {network: {name: value.astype(dtype) for name, value in state.items()} for network, state in states.items()}


def as_safetensors(folder, states):
    safetensors.numpy.save_file(single_file(states), folder / "v1-5-pruned.safetensors")
    return folder / "v1-5-pruned.safetensors"


def as_checkpoint(folder, states):
    save_pickle(folder / "v1-5-pruned.ckpt", *lightning(single_file(states)))
    return folder / "v1-5-pruned.ckpt"


def as_folder(folder, states, variant=""):
    for network, name in FOLDERS.items():
        (folder / name).mkdir()
        stem = "model" if network == "text_encoder" else "diffusion_pytorch_model"
        safetensors.numpy.save_file(states[network], folder / name / f"{stem}{variant}.safetensors")
    return folder


def as_folder_of_2022(folder, states):
    for network, name in FOLDERS.items():
        (folder / name).mkdir()
        state = states[network]
        if network == "autoencoder":
            state = {stable_diffusion.autoencoder_name_of_2022(key): value for key, value in state.items()}
        if network == "text_encoder":
            state = {f"text_model.{key}": value for key, value in state.items()}
            state["text_model.embeddings.position_ids"] = np.arange(77)[None]
        content, storages = pickled(state)
        stem = "pytorch_model" if network == "text_encoder" else "diffusion_pytorch_model"
        save_pickle(folder / name / f"{stem}.bin", pth.HEAD + content + b".", storages)
    return folder


LAYOUTS = {
    "one file": as_safetensors,
    "checkpoint": as_checkpoint,
    "folder": as_folder,
    "half": lambda folder, states: as_folder(folder, states, ".fp16"),
    "2022": as_folder_of_2022,
}
