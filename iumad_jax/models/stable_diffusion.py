"""Weights of Stable Diffusion 1.5 from files of the user, in every layout in which they are published.

One file holds all networks under the names of CompVis (.safetensors, or .ckpt as trained). A folder of `diffusers`
holds a file per network under other names, of which those of the attention in the autoencoder changed after 2022. Our
modules have the names of `diffusers`, with underscores for dots.
"""

import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from iumad_jax.errors import UserError
from iumad_jax.models.autoencoder_kl import AutoencoderKL
from iumad_jax.models.diffusion import Sizes, UNet
from iumad_jax.models.state_dict import MAX_CHECKPOINT_BYTES, map_file, parse
from iumad_jax.models.text_encoder import EMPTY_PROMPT, TextEncoder

State = dict[str, np.ndarray]  # tensors by name
Tree = dict[str, Any]  # parameters of a module


class Tensor(NamedTuple):
    """A tensor of a file."""

    path: tuple[str, ...]  # of our parameter
    ours: tuple[int, ...]  # shape of our parameter
    shape: tuple[int, ...]  # in PyTorch


class Networks(NamedTuple):
    """The networks to read; the defaults are those of Stable Diffusion 1.5."""

    unet: UNet = UNet(Sizes())
    autoencoder: AutoencoderKL = AutoencoderKL()
    text_encoder: TextEncoder = TextEncoder()


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS_OF_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_IN_2022 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_UNUSED = re.compile(  # averaged weights, the noise schedule, numbers of positions, what trained the autoencoder
    r"model_ema\..*|betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|scale_factor|.*\.position_ids"
    r"|(first_stage_model\.)?loss\..*"
)
_ONE_FILE = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model."}
_ONE_FILE |= {"text_encoder": "cond_stage_model.transformer."}  # prefixes
_FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}


def diffusers_name(path: tuple[str, ...]) -> str:
    """Return the name of our parameter in `diffusers`."""
    *modules, leaf = path
    dotted = re.sub(r"(?<!linear)_(\d+)(?=\.|$)", r".\1", ".".join(modules))
    return f"{dotted}.{'bias' if leaf == 'bias' else 'weight'}"


def tensors(params: Tree) -> dict[str, Tensor]:
    """Return the tensors in `diffusers` of a module's parameters, of which only the shapes are used, by name."""
    named = {}
    for path, leaf in flatten_dict(params).items():
        shape = tuple(leaf.shape)
        if path[-1] == "kernel":
            shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        named[diffusers_name(path)] = Tensor(path, tuple(leaf.shape), shape)
    return named


def compvis_unet_name(name: str, names: Collection[str]) -> str:
    """Translate a name of `diffusers` to that in a single file.

    Args:
        name: Name of a tensor of the UNet.
        names: Names of all of them.
    """
    each = 1 + len({n.split(".")[3] for n in names if n.startswith("down_blocks.0.resnets.")})
    match name.split("."):
        case ["down_blocks", level, "downsamplers", _, "conv", leaf]:
            return f"input_blocks.{(int(level) + 1) * each}.0.op.{leaf}"
        case ["down_blocks", level, kind, i, *rest]:
            return f"input_blocks.{1 + int(level) * each + int(i)}.{_inside(kind, rest)}"
        case ["mid_block", "resnets", i, *rest]:
            return f"middle_block.{2 * int(i)}.{_inside('resnets', rest).removeprefix('0.')}"
        case ["mid_block", "attentions", "0", *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["up_blocks", level, "upsamplers", _, "conv", leaf]:
            after = 1 + any(n.startswith(f"up_blocks.{level}.attentions.") for n in names)
            return f"output_blocks.{int(level) * each + each - 1}.{after}.conv.{leaf}"
        case ["up_blocks", level, kind, i, *rest]:
            return f"output_blocks.{int(level) * each + int(i)}.{_inside(kind, rest)}"
    module, _, leaf = name.rpartition(".")
    return f"{_ENDS_OF_UNET[module]}.{leaf}"


def _inside(kind: str, rest: list[str]) -> str:
    """Return what follows the number of a block: residual blocks come before transformers, whose names are equal."""
    return f"0.{_RESNET[rest[0]]}.{rest[1]}" if kind == "resnets" else f"1.{'.'.join(rest)}"


def compvis_autoencoder_name(name: str, names: Collection[str]) -> str:
    """Translate a name of `diffusers` to that in a single file, or in a file of KL-f8; arguments as above."""
    levels = len({n.split(".")[2] for n in names if n.startswith("encoder.down_blocks.")})
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    match name.split("."):
        case [part, ("down_blocks" | "up_blocks") as way, level, kind, i, *rest]:
            number = int(level) if way == "down_blocks" else levels - 1 - int(level)
            inside = {"resnets": f"block.{i}", "downsamplers": "downsample", "upsamplers": "upsample"}[kind]
            return ".".join([part, way.removesuffix("_blocks"), str(number), inside, *rest])
        case [part, "mid_block", "resnets", i, *rest]:
            return ".".join([part, "mid", f"block_{int(i) + 1}", *rest])
        case [part, "mid_block", "attentions", "0", *layer, leaf]:
            return f"{part}.mid.attn_1.{_ATTENTION['.'.join(layer)]}.{leaf}"
    return name


def autoencoder_name_of_2022(name: str) -> str:
    """Translate a name of `diffusers` to that in its folders of 2022."""
    part, found, layer = name.partition(".mid_block.attentions.0.")
    module, _, leaf = layer.rpartition(".")
    return f"{part}{found}{_ATTENTION_IN_2022.get(module, module)}.{leaf}" if found else name


def _names_in(state: State, network: str, params: Tree) -> dict[str, Tensor]:
    """Return the tensors of a network's parameters by their names in a file, whose layout its own names tell."""
    ours = tensors(params)
    prefix = _ONE_FILE[network] if any(name.startswith(_ONE_FILE[network]) for name in state) else ""
    if network == "unet":
        return {prefix + compvis_unet_name(name, ours): t for name, t in ours.items()} if prefix else ours
    if network == "text_encoder":
        prefix += "text_model." if any(name.startswith(f"{prefix}text_model.") for name in state) else ""
        return {prefix + name: t for name, t in ours.items()}
    if prefix or any(name.startswith("encoder.down.") for name in state):
        named = {prefix + compvis_autoencoder_name(name, ours): t for name, t in ours.items()}
        return {  # its attention consists of convolutions
            name: t._replace(shape=(*t.shape, 1, 1)) if ".attn_1." in name and len(t.shape) == 2 else t
            for name, t in named.items()
        }
    if any(".mid_block.attentions.0.query." in name for name in state):
        return {autoencoder_name_of_2022(name): t for name, t in ours.items()}
    return ours


def _found(state: State, network: str, params: Tree, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a network's parameters by their names in a file, which has them all.

    Raises:
        UserError: If a tensor is missing or has another shape; the message names the first.
    """
    named = _names_in(state, network, params)
    for name, tensor in named.items():
        found = state[name].shape if name in state else "missing"
        if found != tensor.shape:
            raise UserError(
                f"weights file {file}: tensor {name!r} of the {network.replace('_', ' ')} should have shape"
                f" {tensor.shape} and is {found}; use weights of Stable Diffusion 1.5."
            )
    return named


def _convert(named: dict[str, Tensor], state: State, file: Path) -> Tree:
    """Convert the tensors of a file to our parameters in float32: views of the file where they are so there.

    Raises:
        UserError: If a tensor is not finite; the message names the first.
    """
    params = {}
    for name, (path, ours, _) in named.items():
        value = np.asarray(state[name], np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"weights file {file}: tensor {name!r} is not finite; download it again.")
        if path[-1] == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        params[path] = value.reshape(ours)
    return unflatten_dict(params)


def _check_rest(state: State, used: Collection[str], prefix: str, file: Path) -> None:
    """Refuse tensors of a file that no network uses.

    Args:
        state: Tensors of the file.
        used: Names that a network uses.
        prefix: Of the names that matter.
        file: The file, for the error message.

    Raises:
        UserError: If there is such a tensor; the message names the first.
    """
    for name in state:
        if name.startswith(prefix) and name not in used and not _UNUSED.fullmatch(name):
            raise UserError(
                f"weights file {file}: tensor {name!r} is not part of Stable Diffusion 1.5; use weights of that alone."
            )


def _read(file: Path) -> State:
    return parse(map_file(file, MAX_CHECKPOINT_BYTES), file, checkpoint=True)


def _file_in(folder: Path, text: bool = False) -> Path:
    """Return the file of weights in a folder of one network.

    Raises:
        UserError: If there is none.
    """
    stems = {".safetensors": "model", ".bin": "pytorch_model"} if text else {}
    names = [
        f"{stems.get(suffix, 'diffusion_pytorch_model')}{variant}{suffix}"
        for suffix in (".safetensors", ".bin")
        for variant in ("", ".fp16", ".non_ema")
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"weights folder {folder} has no file {names[0]}; use the folder as `diffusers` stores it.")


def files(path: str) -> dict[str, Path]:
    """Return the files that `load` reads, by the name of the network; they may be a single one.

    Raises:
        UserError: If the path is a folder that lacks one of them.
    """
    if Path(path).is_dir():
        single = sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".ckpt"))
        if single and not (Path(path) / _FOLDERS["unet"]).is_dir():
            raise UserError(f"weights folder {path} has no folder {_FOLDERS['unet']}; name a file in it, {single[0]}.")
        return {network: _file_in(Path(path) / name, name == "text_encoder") for network, name in _FOLDERS.items()}
    return dict.fromkeys(_FOLDERS, Path(path))


def file_of_autoencoder(path: str) -> Path:
    """Return the file that `load_autoencoder` reads.

    Raises:
        UserError: If the path is a folder that lacks it.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    return _file_in(folder / _FOLDERS["autoencoder"] if (folder / _FOLDERS["autoencoder"]).is_dir() else folder)


def load(path: str, networks: Networks = Networks()) -> dict[str, Any]:  # noqa: B008
    """Load Stable Diffusion 1.5.

    Args:
        path: A single file, .safetensors or .ckpt, or a folder of `diffusers`; in any precision.
        networks: The networks, whose parameters the files must be, no more and no less.

    Returns:
        Parameters of the modules by the names "unet" and "autoencoder", and "context" (77, 768), the text encoder's
        output for the empty prompt. All are float32; where a file is so too, they are views of the mapped file.

    Raises:
        UserError: If a file cannot be read, or holds anything else; the message names the first wrong tensor.
    """
    loaded = {network: _convert(*opened) for network, opened in _open(path, networks).items()}
    context = _context(networks.text_encoder, loaded.pop("text_encoder"))
    return loaded | {"context": context}


def load_autoencoder(path: str, autoencoder: AutoencoderKL = AutoencoderKL()) -> Tree:  # noqa: B008
    """Load the parameters of the autoencoder, in float32.

    Args:
        path: What `load` reads, of which the rest is ignored; or a file of the autoencoder alone (KL-f8 as trained or
            as `diffusers` stores it), or the folder of such a file.
        autoencoder: The module.

    Raises:
        UserError: As in `load`.
    """
    return _convert(*_open_autoencoder(path, autoencoder))


def check(path: str, networks: Networks, autoencoder: str = "") -> None:
    """Check names and shapes of all tensors, without reading them, in what `load` and `load_autoencoder` are given.

    Raises:
        UserError: As in `load`, except that numbers may not be finite.
    """
    _open(path, networks)
    if autoencoder:
        _open_autoencoder(autoencoder, networks.autoencoder)


def _open(path: str, networks: Networks) -> dict[str, tuple[dict[str, Tensor], State, Path]]:
    """Return tensors, state and file by the name of the network, as `load` needs them."""
    sources, shapes = files(path), _shapes(networks, *Networks._fields)
    states = {file: _read(file) for file in set(sources.values())}
    found = {network: _found(states[file], network, shapes[network], file) for network, file in sources.items()}
    for file, state in states.items():
        _check_rest(
            state, {name for network in sources if sources[network] == file for name in found[network]}, "", file
        )
    return {network: (found[network], states[file], file) for network, file in sources.items()}


def _open_autoencoder(path: str, autoencoder: AutoencoderKL) -> tuple[dict[str, Tensor], State, Path]:
    """Return tensors, state and file, as `load_autoencoder` needs them."""
    file = file_of_autoencoder(path)
    state = _read(file)
    shapes = _shapes(Networks(autoencoder=autoencoder), "autoencoder")["autoencoder"]
    named = _found(state, "autoencoder", shapes, file)
    prefix = _ONE_FILE["autoencoder"]
    _check_rest(state, named, prefix if any(name.startswith(prefix) for name in named) else "", file)
    return named, state, file


@functools.lru_cache(maxsize=4)  # tracing the networks takes seconds
def _shapes(networks: Networks, *names: str) -> dict[str, Tree]:
    """Return the shapes of all parameters of some networks, by name."""
    inputs: dict[str, tuple[Any, ...]] = {
        "unet": (jnp.zeros((16, 16, networks.unet.sizes.latent)), 0, jnp.zeros((1, networks.text_encoder.width))),
        "autoencoder": (jnp.zeros((64, 64, 3)),),
        "text_encoder": (EMPTY_PROMPT,),
    }
    initialised = {
        name: jax.eval_shape(getattr(networks, name).init, jax.random.key(0), *inputs[name]) for name in names
    }
    return {name: variables["params"] for name, variables in initialised.items()}


def _context(text_encoder: TextEncoder, params: Tree) -> np.ndarray:
    """Encode the empty prompt."""
    with jax.default_matmul_precision("float32"):
        return np.asarray(jax.jit(text_encoder.apply)({"params": params}, EMPTY_PROMPT))
