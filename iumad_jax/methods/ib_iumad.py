"""IB-IUMAD (Long et al., CVPR 2026): one Mamba decoder and one reconstruction transformer per modality, fused under an
information bottleneck.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.anomaly_map import norm, predict_from_errors
from iumad_jax.methods.method import Method
from iumad_jax.methods.statistics import merge_moments, no_moments, standardise
from iumad_jax.models.fusion import Fused, InformationBottleneckFusion
from iumad_jax.models.mamba import MambaDecoder
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.shapes import Batch, Keys, Logits, Modality, Prediction, Scalars, Tokens, Variables


def jitter(key: PRNGKeyArray, tokens: Tokens, *, scale: float, probability: float) -> Tokens:
    """Token t becomes t + n * (|t|_2 / f) * scale with n ~ N(0, I), with this probability, drawn for each image.

    UniAD's jitter, which is drawn once for a whole batch.
    """
    chance, noise = jax.random.split(key)
    strength = scale * jnp.linalg.norm(tokens, axis=-1, keepdims=True) / tokens.shape[-1]
    applied = jax.random.bernoulli(chance, probability)
    return tokens + applied * strength * jax.random.normal(noise, tokens.shape)


class Network(nn.Module):
    """Everything that is trained, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]
    objects: int

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Array], *, deterministic: bool
    ) -> tuple[Fused, dict[Modality, Logits], dict[Modality, Tokens]]:
        """The fused reconstruction, the object's logits by modality, and (if asked for) each branch's own features."""
        config = self.config
        channels = tokens[self.modalities[0]].shape[-1]
        grid = round(tokens[self.modalities[0]].shape[0] ** 0.5)
        reconstructions, logits, features = [], {}, {}
        for modality in self.modalities:
            mamba = MambaDecoder(
                self.objects,
                grid,
                config.width,
                config.patch_size,
                config.layers,
                config.states,
                config.scan or None,
                name=f"mamba_{modality}",
            )
            condition, logits[modality] = mamba(images[modality])
            if config.detach_condition:
                condition = jax.lax.stop_gradient(condition)
            transformer = ReconstructionTransformer(
                grid,
                config.width,
                config.heads,
                config.layers,
                config.hidden,
                config.dropout,
                name=f"reconstruction_{modality}",
            )
            x = tokens[modality]
            if not deterministic:
                x = jitter(self.make_rng("jitter"), x, scale=config.jitter.scale, probability=config.jitter.probability)
            reconstructions.append(transformer(x, condition, deterministic=deterministic)[-1])
            if config.aux_reconstruction_weight:
                project = nn.Dense(channels, kernel_init=nn.initializers.zeros, name=f"project_{modality}")
                features[modality] = project(reconstructions[-1])
        fusion = InformationBottleneckFusion(
            channels * len(_target_modalities(config.target, self.modalities)),
            self.objects,
            config.heads,
            config.bottleneck_ratio,
            config.dropout,
            name="fusion",
        )
        return fusion(*reconstructions, deterministic=deterministic), logits, features


def _target_modalities(target: str, modalities: tuple[Modality, ...]) -> tuple[Modality, ...]:
    if target not in ("both", "rgb", "depth"):
        raise UserError(f'config.model.target is "{target}"; use both, rgb or depth.')
    return modalities if target == "both" or len(modalities) == 1 else (target,)


def bottleneck_loss(fused: Fused, object_id: Array, head_weight: float) -> Scalars:
    """What the bottleneck of one image must keep (variational self-distillation): the object that F_fu tells."""
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
        UserError: `config.target` is no modality.
    """
    network: Any = Network(config, modalities, objects)
    target_modalities = _target_modalities(config.target, modalities)

    def normalised(variables: Variables, batch: Batch) -> dict[Modality, Float[Array, "b p f"]]:
        return (
            {m: standardise(batch.features[m], variables["statistics"][m]) for m in modalities}
            if config.standardise
            else batch.features
        )

    def init(key: PRNGKeyArray, batch: Batch) -> Variables:
        first = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
        params = network.init(key, first.features, first.images, deterministic=True)["params"]
        statistics = {m: no_moments(batch.features[m].shape[-1]) for m in modalities} if config.standardise else {}
        return {"params": params, "statistics": statistics}

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if not config.standardise or step > 0:
            return variables
        seen = variables["statistics"]
        return variables | {"statistics": {m: merge_moments(seen[m], batch.features[m]) for m in modalities}}

    def loss(variables: Variables, batch: Batch, keys: Keys) -> tuple[Array, Scalars]:
        def of_one_image(features: Any, images: Any, object_id: Array, key: PRNGKeyArray) -> Scalars:
            jitter_key, dropout_key = jax.random.split(key)
            fused, logits, own = network.apply(
                {"params": variables["params"]},
                features,
                images,
                deterministic=False,
                rngs={"jitter": jitter_key, "dropout": dropout_key},
            )
            target = jnp.concatenate([features[m] for m in target_modalities], axis=-1)
            terms = {"fusion": config.fusion_weight * jnp.mean((fused.compressed - target) ** 2)}
            for m in modalities:
                terms[f"object_{m}"] = config.object_weight * optax.softmax_cross_entropy_with_integer_labels(
                    logits[m], object_id
                )
            ib = bottleneck_loss(fused, object_id, config.ib_head_weight)
            terms |= {name: config.ib_weight * value for name, value in ib.items()}
            for m, reconstruction in own.items():
                terms[f"aux_{m}"] = config.aux_reconstruction_weight * jnp.mean((reconstruction - features[m]) ** 2)
            return terms

        features = normalised(variables, batch)
        terms = jax.tree.map(jnp.mean, jax.vmap(of_one_image)(features, batch.images, batch.object_id, keys))
        return sum(terms.values()), terms

    def predict(variables: Variables, batch: Batch) -> Prediction:
        def of_one_image(features: Any, images: Any) -> tuple[Array, Logits]:
            fused, logits, _ = network.apply({"params": variables["params"]}, features, images, deterministic=True)
            target = jnp.concatenate([features[m] for m in target_modalities], axis=-1)
            return norm(fused.compressed - target), sum(map(nn.log_softmax, logits.values()), start=jnp.zeros(objects))

        return predict_from_errors(*jax.vmap(of_one_image)(normalised(variables, batch), batch.images))

    return Method(init, predict, loss, observe)
