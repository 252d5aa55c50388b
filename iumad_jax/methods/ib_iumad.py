"""IB-IUMAD (Long et al., CVPR 2026).

One Mamba decoder and one reconstruction transformer per modality, fused under an information bottleneck.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method
from iumad_jax.methods.network import Residuals, from_network, reconstruct
from iumad_jax.models.fusion import Fused, InformationBottleneckFusion
from iumad_jax.models.mamba import MambaDecoder
from iumad_jax.shapes import Image, Logits, Modality, Scalars, Tokens


class Output(NamedTuple):
    """Network output for one image."""

    fused: Fused
    logits: dict[Modality, Logits]  # object logits of each Mamba decoder
    auxiliary: dict[Modality, Tokens]  # features rebuilt by each branch alone; empty without an auxiliary loss


class Network(nn.Module):
    """The trained network, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Image], *, deterministic: bool
    ) -> tuple[Output, dict[Modality, tuple[Float[Array, "p d"], ...]]]:
        """Return the output and, by modality, the outputs of the decoder layers of its transformer."""
        config = self.config
        channels = tokens[self.modalities[0]].shape[-1]
        decoder, logits, auxiliary = {}, {}, {}
        for m in self.modalities:
            condition = None
            if config.mamba:
                mamba = MambaDecoder(
                    round(tokens[m].shape[0] ** 0.5),
                    config.width,
                    config.patch_size,
                    config.layers,
                    config.states,
                    config.scan or None,
                    name=f"mamba_{m}",
                )
                condition, logits[m] = mamba(images[m])
                if config.detach_condition:
                    condition = jax.lax.stop_gradient(condition)
            decoder[m] = reconstruct(self, m, tokens[m], condition, deterministic=deterministic)
            if config.aux_reconstruction_weight:
                project = nn.Dense(channels, kernel_init=nn.initializers.zeros, name=f"project_{m}")
                auxiliary[m] = project(decoder[m][-1])
        fusion = InformationBottleneckFusion(
            channels * len(_target_modalities(config.target, self.modalities)),
            config.heads,
            config.bottleneck_ratio,
            config.dropout,
            config.fusion == "addition",
            config.bottleneck,
            name="fusion",
        )
        fused = fusion(*(outputs[-1] for outputs in decoder.values()), deterministic=deterministic)
        return Output(fused, logits, auxiliary), decoder


def _target_modalities(target: str, modalities: tuple[Modality, ...]) -> tuple[Modality, ...]:
    if target not in ("both", "rgb", "depth"):
        raise UserError(f'config.model.target is "{target}"; use both, rgb or depth.')
    return modalities if target == "both" or len(modalities) == 1 else (target,)


def bottleneck_loss(fused: Fused, object_id: Array, head_weight: float) -> Scalars:
    """Compute the bottleneck loss of one image by variational self-distillation.

    The compressed representation must retain the information about the object in the fused one, F_fu.
    """
    assert fused.fused_logits is not None
    assert fused.compressed_logits is not None
    teacher = jax.lax.stop_gradient(nn.softmax(fused.fused_logits))
    log_teacher = jax.lax.stop_gradient(nn.log_softmax(fused.fused_logits))
    kl = jnp.sum(teacher * (log_teacher - nn.log_softmax(fused.compressed_logits)))
    head_losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits, object_id)
        for logits in (fused.fused_logits, fused.compressed_logits)
    ]
    return {"kl": kl, "ib_heads": head_weight * (head_losses[0] + head_losses[1])}


def ib_iumad(config: ConfigDict, modalities: tuple[Modality, ...]) -> Method:
    """Build the method for `config.model`, whose keys `iumad_jax.config` explains.

    Raises:
        UserError: If `config.target` or `config.fusion` is unknown.
    """
    if config.fusion not in ("attention", "addition"):
        raise UserError(f'config.model.fusion is "{config.fusion}"; use attention or addition.')
    target_modalities = _target_modalities(config.target, modalities)

    def error(output: Output, features: dict[Modality, Tokens]) -> Float[Array, "p target"]:
        return output.fused.compressed - jnp.concatenate([features[m] for m in target_modalities], axis=-1)

    def losses(output: Output, features: dict[Modality, Tokens], object_id: Array) -> Scalars:
        terms = {"fusion": config.fusion_weight * jnp.mean(error(output, features) ** 2)}
        for m, logits in output.logits.items():
            ce = optax.softmax_cross_entropy_with_integer_labels(logits, object_id)
            terms[f"object_{m}"] = config.object_weight * ce
        if config.bottleneck:
            ib_terms = bottleneck_loss(output.fused, object_id, config.ib_head_weight)
            terms |= {name: config.ib_weight * value for name, value in ib_terms.items() if config.kl or name != "kl"}
        for m, reconstruction in output.auxiliary.items():
            terms[f"aux_{m}"] = config.aux_reconstruction_weight * jnp.mean((reconstruction - features[m]) ** 2)
        return terms

    def residuals_and_logits(
        output: Output, features: dict[Modality, Tokens]
    ) -> tuple[Residuals, dict[Modality, Logits]]:
        by_modality = jnp.split(error(output, features), len(target_modalities), axis=-1)
        return dict(zip(target_modalities, by_modality, strict=True)), output.logits

    return from_network(Network(config, modalities), config, modalities, losses, residuals_and_logits)
