"""Outputs of latent diffusion models computed with torch, diffusers and transformers, as oracles of our own.

To write them again, with these installed: `python -m tests.oracle.make`.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from tests.models.seeded import seeded_state
from tests.oracle import inputs
from tests.oracle.inputs import CHANNELS, CONTEXT, GROUPS, HEADS, HINT, LEVELS, normal

GOLDENS = Path(__file__).with_name("goldens.npz")
Outputs = dict[str, np.ndarray]
functional = torch.nn.functional


def seeded(model):
    """Give every tensor of a model a random value that depends on its name."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in inputs.state_dict(shapes).items()})
    return model.eval()


def image(name: str, *shape: int) -> torch.Tensor:
    """Draw an image or latent by its name; `shape` is channels last."""
    return torch.from_numpy(normal(name, *shape).transpose(2, 0, 1)[None].copy())


def context() -> torch.Tensor:
    return torch.from_numpy(normal("context", *CONTEXT))[None]


def last(x: torch.Tensor) -> np.ndarray:
    """Convert the outputs for one image to channels last."""
    return x[0].numpy().transpose(1, 2, 0)


def autoencoder_model(channels=CHANNELS):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=GROUPS,
    )


def unet_model(channels=CHANNELS, blocks=2, attending=(0, 1, 2), cross=CONTEXT[1]):
    levels = range(len(channels))
    return diffusers.UNet2DConditionModel(
        down_block_types=["CrossAttnDownBlock2D" if i in attending else "DownBlock2D" for i in levels],
        up_block_types=["CrossAttnUpBlock2D" if i in attending else "UpBlock2D" for i in reversed(levels)],
        block_out_channels=channels,
        layers_per_block=blocks,
        attention_head_dim=HEADS,  # the number of heads, despite its name
        cross_attention_dim=cross,
        norm_num_groups=GROUPS,
    )


def controlnet_model():
    return diffusers.ControlNetModel(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        block_out_channels=CHANNELS,
        attention_head_dim=HEADS,
        cross_attention_dim=CONTEXT[1],
        norm_num_groups=GROUPS,
        conditioning_embedding_out_channels=HINT,
    )


def text_model():
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=inputs.TEXT["width"],
            intermediate_size=4 * inputs.TEXT["width"],
            num_hidden_layers=inputs.TEXT["layers"],
            num_attention_heads=inputs.TEXT["heads"],
            max_position_embeddings=77,
            hidden_act="quick_gelu",
        )
    )


def autoencoder() -> Outputs:
    model, outputs = seeded(autoencoder_model()), {}
    for rows, columns in inputs.AUTOENCODER_SIZES:
        distribution = model.encode(image("image", rows, columns, 3)).latent_dist
        size = f"{rows}x{columns}"
        outputs |= {f"mean {size}": last(distribution.mean), f"log-variance {size}": last(distribution.logvar)}
        latent = image("latent", rows // 8, columns // 8, 4)
        outputs[f"decoded {size}"] = last(model.decode(latent).sample)
    return outputs


def unet() -> Outputs:
    model = seeded(unet_model())
    return {
        f"{size} {level}": last(model(image("latent", size, size, 4), level, context()).sample)
        for size in inputs.LATENT_SIZES
        for level in LEVELS
    }


def unet_without_context() -> Outputs:
    """Compute with a context of zeros, to which attention adds nothing without its bias."""
    model = seeded(unet_model((8, 16, 16), blocks=1, attending=(1, 2)))
    for name, value in model.named_parameters():
        if name.endswith("attn2.to_out.0.bias"):
            value.zero_()
    nothing = torch.zeros(1, 1, CONTEXT[1])
    return {str(level): last(model(image("latent", 14, 14, 4), level, nothing).sample) for level in LEVELS}


def guided(fuse: bool) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return the noise that DiAD's UNet predicts, and what guides it: the fused coarsest outputs, the middle's."""
    guide, latent, level = seeded(controlnet_model()), image("latent", 16, 16, 4), LEVELS[1]
    outputs, middle = guide(latent, level, context(), image("hint", 128, 128, 3), return_dict=False)
    shapes = {f"fusion_{j}.{k}.weight": (CHANNELS[3], CHANNELS[2], 3, 3) for j in range(3) for k in range(3)}
    kernels = {name: torch.from_numpy(value) for name, value in seeded_state(shapes).items()}
    fused = []
    for k in range(3):
        total = outputs[9 + k]
        for j in range(3 if fuse else 0):
            reduced = functional.conv2d(outputs[6 + j], kernels[f"fusion_{j}.{k}.weight"], stride=2, padding=1)
            total = total + functional.silu(functional.instance_norm(reduced))
        fused.append(functional.silu(total))
    added = [torch.zeros_like(x) for x in outputs[:9]] + fused
    noise = seeded(unet_model())(
        latent,
        level,
        context(),
        down_block_additional_residuals=added,
        mid_block_additional_residual=middle,
    ).sample
    return noise, fused, middle


def diad() -> Outputs:
    outputs = {}
    for fuse in (True, False):
        noise, fused, middle = guided(fuse)
        outputs |= {f"noise {fuse}": last(noise), f"middle {fuse}": last(middle)}
        outputs |= {f"coarsest {k} {fuse}": last(x) for k, x in enumerate(fused)}
    return outputs


def sines(grid: int, width: int) -> torch.Tensor:
    """Compute the positions of DETR with normalised coordinates, one number after another."""
    half = width // 2
    positions = torch.zeros(grid, grid, width, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for i in range(half):
                for place, offset in ((row, 0), (column, half)):
                    angle = (place + 1) / (grid + 1e-6) * 2 * np.pi / 10_000 ** (2 * (i // 2) / half)
                    positions[row, column, offset + i] = np.cos(angle) if i % 2 else np.sin(angle)
    return positions.reshape(grid * grid, width).float()


def cdad() -> Outputs:
    """Run the transformer with torch's attention, and add its output to that of the UNet's first convolution."""
    state = {name: torch.from_numpy(value) for name, value in inputs.amn_state().items()}
    d, grid = CHANNELS[0], 8
    masked = image("masked", 8 * grid, 8 * grid, 3)
    x = functional.silu(functional.conv2d(masked, state["hint.conv_in.weight"], padding=1))
    for i in range(2 * len(HINT) - 2):
        x = functional.silu(functional.conv2d(x, state[f"hint.blocks.{i}.weight"], stride=1 + i % 2, padding=1))
    embedded = functional.conv2d(x, state["hint.conv_out.weight"], padding=1)
    x = embedded[0].flatten(1).T
    row, column = (a.flatten() for a in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    hidden = torch.maximum(abs(row[:, None] - row), abs(column[:, None] - column)) <= inputs.NEIGHBOURHOOD // 2
    for i in range(inputs.AMN_LAYERS):
        attention = torch.nn.MultiheadAttention(d, HEADS)
        attention.in_proj_weight.copy_(torch.cat([state[f"{i}.{n}.weight"] for n in ("query", "key", "value")]))
        attention.in_proj_bias.copy_(torch.cat([state[f"{i}.{n}.bias"] for n in ("query", "key", "value")]))
        attention.out_proj.load_state_dict({part: state[f"{i}.out.{part}"] for part in ("weight", "bias")})
        placed = x + sines(grid, d)
        x = x + attention(placed, placed, x, attn_mask=hidden)[0]
        x = functional.layer_norm(x, (d,), state[f"{i}.norm1.weight"], state[f"{i}.norm1.bias"])
        y = functional.relu(functional.linear(x, state[f"{i}.hidden.weight"], state[f"{i}.hidden.bias"]))
        x = x + functional.linear(y, state[f"{i}.output.weight"], state[f"{i}.output.bias"])
        x = functional.layer_norm(x, (d,), state[f"{i}.norm2.weight"], state[f"{i}.norm2.bias"])
    added = x.T.reshape(1, d, grid, grid)
    model = seeded(unet_model())
    model.conv_in.register_forward_hook(lambda module, given, output: output + added)
    noise = model(image("latent", grid, grid, 4), LEVELS[1], context()).sample
    return {"embedded": last(embedded), "added": last(added), "noise": last(noise)}


def sampling() -> Outputs:
    outputs: Outputs = {}
    for kind in ("epsilon", "v_prediction"):
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=kind,
        )
        scheduler.set_timesteps(10)
        clean, noise = image("clean", 4, 4, 2), image("noise", 4, 4, 2)
        z, received = scheduler.add_noise(clean, noise, torch.tensor([999])), []
        for level in scheduler.timesteps:
            received.append(last(z))
            z = scheduler.step(torch.tanh(z) + level / 1000, level, z).prev_sample
        outputs |= {f"levels {kind}": scheduler.timesteps.numpy(), f"result {kind}": last(z)}
        outputs[f"received {kind}"] = np.stack(received)
    outputs["v"] = last(scheduler.get_velocity(clean, noise, torch.tensor([501])))
    return outputs


def text_encoder() -> Outputs:
    tokens = torch.tensor([[49406] + [49407] * 76])
    return {"context": seeded(text_model())(tokens).last_hidden_state[0].numpy()}


CASES = {case.__name__: case for case in (autoencoder, unet, unet_without_context, diad, cdad, sampling, text_encoder)}


def compute(case: str) -> Outputs:
    with torch.no_grad():
        return CASES[case]()


if __name__ == "__main__":
    outputs = {f"{case}/{name}": value for case in CASES for name, value in compute(case).items()}
    np.savez_compressed(GOLDENS, **{name: value.astype(np.float32) for name, value in outputs.items()})
