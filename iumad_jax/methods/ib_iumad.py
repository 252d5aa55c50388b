"""IB-IUMAD (Long et al., CVPR 2026): one Mamba decoder and one reconstruction transformer per modality, fused under an
information bottleneck.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.error_maps import group, norm
from iumad_jax.methods.method import Method
from iumad_jax.methods.network import Errors, from_network, reconstruct
from iumad_jax.models.fusion import Fused, InformationBottleneckFusion
from iumad_jax.models.mamba import MambaDecoder
from iumad_jax.shapes import Image, Logits, Modality, Scalars, Tokens


class Output(NamedTuple):
    """What the network makes of one image."""

    fused: Fused
    logits: dict[Modality, Logits]  # the object, as each Mamba decoder sees it
    own: dict[Modality, Tokens]  # each branch's own features, if asked for


class Network(nn.Module):
    """Everything that is trained, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]
    objects: int

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Image], *, deterministic: bool
    ) -> tuple[Output, dict[Modality, tuple[Float[Array, "p d"], ...]]]:
        """The output and the outputs of each modality's decoder layers."""
        config = self.config
        channels = tokens[self.modalities[0]].shape[-1]
        decoder, logits, own = {}, {}, {}
        for m in self.modalities:
            condition = None
            if config.mamba:
                mamba = MambaDecoder(
                    self.objects,
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
                own[m] = project(decoder[m][-1])
        fusion = InformationBottleneckFusion(
            channels * len(_target_modalities(config.target, self.modalities)),
            self.objects,
            config.heads,
            config.bottleneck_ratio,
            config.dropout,
            config.fusion == "addition",
            config.bottleneck,
            name="fusion",
        )
        fused = fusion(*(outputs[-1] for outputs in decoder.values()), deterministic=deterministic)
        return Output(fused, logits, own), decoder


def _target_modalities(target: str, modalities: tuple[Modality, ...]) -> tuple[Modality, ...]:
    if target not in ("both", "rgb", "depth"):
        raise UserError(f'config.model.target is "{target}"; use both, rgb or depth.')
    return modalities if target == "both" or len(modalities) == 1 else (target,)


def bottleneck_loss(fused: Fused, object_id: Array, head_weight: float) -> Scalars:
    """What the bottleneck of one image must keep (variational self-distillation): the object that F_fu tells."""
    assert fused.fused_logits is not None
    assert fused.compressed_logits is not None
    told = jax.lax.stop_gradient(nn.softmax(fused.fused_logits))
    kl = jnp.sum(
        told * (jax.lax.stop_gradient(nn.log_softmax(fused.fused_logits)) - nn.log_softmax(fused.compressed_logits))
    )
    heads = [
        optax.softmax_cross_entropy_with_integer_labels(logits, object_id)
        for logits in (fused.fused_logits, fused.compressed_logits)
    ]
    return {"kl": kl, "ib_heads": head_weight * (heads[0] + heads[1])}


def ib_iumad(config: ConfigDict, modalities: tuple[Modality, ...], objects: int) -> Method:
    """The method for `config.model` (every key explained in `iumad_jax.config`).

    Raises:
        UserError: `config.target` is no modality, or there is no such `config.fusion`.
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
            ib = bottleneck_loss(output.fused, object_id, config.ib_head_weight)
            terms |= {name: config.ib_weight * value for name, value in ib.items() if config.kl or name != "kl"}
        for m, reconstruction in output.own.items():
            terms[f"aux_{m}"] = config.aux_reconstruction_weight * jnp.mean((reconstruction - features[m]) ** 2)
        return terms

    def explain(output: Output, features: dict[Modality, Tokens]) -> tuple[Errors, dict[Modality, Logits]]:
        return {group(target_modalities): norm(error(output, features))}, output.logits

    return from_network(Network(config, modalities, objects), config, modalities, losses, explain)
