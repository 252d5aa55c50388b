"""UniAD in PyTorch, with its training update and prediction, as a peer of `iumad_jax.methods.uniad`.

Dimensions are named as in `iumad_jax.shapes`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from iumad_jax import config as configs
from iumad_jax.shapes import MAP_SIZE

# Parts of our names of weights, joined by dots, and what they are called here.
RENAMED = {
    r"^(reconstruction|project)_": r"\1.",
    r"\b(encoder|decoder)_(\d+)_": r"\1.\2.",
    r"\b(kernel|scale)$": "weight",
}


class Attention(nn.Module):
    """Multi-head attention. Every head has its own dropout mask."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attend from the queries to the keys and values.

        Args:
            q: Shape (b, p, d), or (1, p, d) if all images have the same queries.
            k: Shape (b, p, d).
            v: Shape (b, p, d).
            mask: Which keys (columns) each query (row) may attend to, boolean, shape (p, p).

        Returns:
            Shape (b, p, d).
        """
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(q), self.key(k), self.value(v))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q.expand_as(k), k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """d -> hidden -> d with ReLU and dropout."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token, (b, p, d) to (b, p, d)."""
        return self.output(self.dropout(F.relu(self.hidden(x))))


class EncoderLayer(nn.Module):
    """Attention among the tokens of an image, and a feed-forward layer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Transform x, (b, p, d) to (b, p, d), with position embeddings (p, d) and the mask (p, p)."""
        placed = x + position
        x = self.norm_1(x + self.dropout(self.attention(placed, placed, x, mask)))
        return self.norm_2(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Attention from learned queries to two inputs in turn, and a feed-forward layer."""

    def __init__(self, tokens: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, width))
        self.attention_1, self.attention_2 = (Attention(width, heads, dropout) for _ in range(2))
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Tensor, previous: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Decode `memory`, the encoder's output, and `previous`, the previous layer's output.

        Args:
            memory: Shape (b, p, d).
            previous: Shape (b, p, d).
            position: Position embeddings, shape (p, d).
            mask: Shape (p, p).

        Returns:
            Shape (b, p, d).
        """
        x = self.query[None]
        x = self.norm_1(x + self.dropout(self.attention_1(x + position, memory + position, memory, mask)))
        x = self.norm_2(x + self.dropout(self.attention_2(x + position, previous + position, previous, mask)))
        return self.norm_3(x + self.dropout(self.feed_forward(x)))


class ReconstructionTransformer(nn.Module):
    """Transformer that reconstructs the tokens of good images from jittered tokens."""

    def __init__(
        self, grid: int, channels: int, *, width: int, heads: int, layers: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = width, heads, hidden, dropout
        self.embed = nn.Linear(channels, width)
        self.row_position = nn.Parameter(torch.rand(grid, 1, width // 2))
        self.column_position = nn.Parameter(torch.rand(1, grid, width // 2))
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(grid * grid, *sizes) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.register_buffer("mask", neighbour_mask(grid), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the output of the last decoder layer, (b, p, f) to (b, p, d)."""
        halves = torch.broadcast_tensors(self.row_position, self.column_position)
        position = torch.cat(halves, -1).flatten(0, 1)
        x = self.embed(tokens)
        for layer in self.encoder:
            x = layer(x, position, self.mask)
        memory = x
        for layer in self.decoder:
            x = layer(memory, x, position, self.mask)
        return self.final_norm(x)


def neighbour_mask(grid: int, side: int = 7) -> Tensor:
    """Compute which tokens each token may attend to: all but its side x side neighbourhood. Boolean, shape (p, p)."""
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    return torch.cdist(places, places, p=float("inf")) > side // 2


class ZScores(nn.Module):
    """Z-scores of channels, by given means and variances."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Compute the z-scores of features (b, p, f)."""
        return (features - self.mean) / torch.sqrt(self.variance + 1e-6)


class Jitter(nn.Module):
    """Noise on tokens, in training: t + n * (|t|_2 / f) * scale with n ~ N(0, I), decided for each image."""

    def __init__(self, scale: float, probability: float) -> None:
        super().__init__()
        self.scale, self.probability = scale, probability

    def forward(self, tokens: Tensor) -> Tensor:
        """Jitter the tokens, (b, p, f) to (b, p, f)."""
        if not self.training:
            return tokens
        applied = torch.rand(len(tokens), 1, 1) < self.probability
        strength = self.scale / tokens.shape[-1] * torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        return tokens + applied * strength * torch.randn_like(tokens)


class UniAD(nn.Module):
    """UniAD for features of one or two modalities, which are the target of the reconstruction."""

    def __init__(self, config: ConfigDict, channels: int) -> None:
        super().__init__()
        model, modalities = config.model, configs.modalities(config)
        sizes = {name: model[name] for name in ("width", "heads", "layers", "hidden", "dropout")}
        self.statistics = nn.ModuleDict(
            {m: ZScores(channels) if model.standardise else nn.Identity() for m in modalities}
        )
        self.jitter = Jitter(model.jitter.scale, model.jitter.probability)
        self.reconstruction = nn.ModuleDict(
            {m: ReconstructionTransformer(config.backbone.grid, channels, **sizes) for m in modalities}
        )
        self.project = nn.ModuleDict({m: nn.Linear(model.width, channels) for m in modalities})

    def forward(self, features: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rebuilt features and their target, the features or their z-scores.

        Args:
            features: Shape (b, p, f), by modality.

        Returns:
            Two dictionaries of shapes (b, p, f), by modality.
        """
        target = {m: statistics(features[m]) for m, statistics in self.statistics.items()}
        return {m: self.project[m](self.reconstruction[m](self.jitter(target[m]))) for m in target}, target

    def loss(self, features: dict[str, Tensor]) -> Tensor:
        """Compute the sum of the mean squared errors of all modalities, shape (), of features (b, p, f)."""
        rebuilt, target = self(features)
        return sum(F.mse_loss(rebuilt[m], target[m]) for m in target)

    def error_map(self, features: dict[str, Tensor]) -> Tensor:
        """Compute the error at every pixel, shape (b, m, m), of features (b, p, f)."""
        rebuilt, target = self(features)
        error = torch.linalg.vector_norm(torch.cat([rebuilt[m] - target[m] for m in target], -1), dim=-1)
        side = round(error.shape[1] ** 0.5)
        grid = error.unflatten(1, (1, side, side))
        return F.interpolate(grid, (MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=True)[:, 0]


def load(network: UniAD, variables: dict[str, Any]) -> UniAD:
    """Copy the weights and statistics of our UniAD.

    Args:
        network: The network to change.
        variables: "params" and "statistics" of `iumad_jax.methods.uniad`, built from the same config.

    Returns:
        The network.
    """
    here, state = network.state_dict(), {}
    for path, array in jax.tree.leaves_with_path(variables["params"] | {"statistics": variables["statistics"]}):
        name = ".".join(entry.key for entry in path)
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)
        if name in here:
            shape = here[name].shape  # ours separates the heads, and a kernel's inputs come first
            values = array.reshape(shape[::-1]).T if path[-1].key == "kernel" else array.reshape(shape)
            state[name] = torch.tensor(np.array(values))
    network.load_state_dict(state)
    return network


def training_update(
    network: UniAD, features: dict[str, Tensor], train: ConfigDict, compiled: bool = False
) -> Callable[[], float]:
    """Return a function that updates the weights and returns the loss before.

    Args:
        network: The network, which is set to training.
        features: Shape (b, p, f), by modality.
        train: `config.train`, with the optimiser AdamW. Biases and the scales of norms do not decay.
        compiled: Whether to compile the loss with its gradient.
    """
    network.train()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    loss_of = torch.compile(network.loss) if compiled else network.loss

    def update() -> float:
        optimizer.zero_grad()
        loss = loss_of(features)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), train.clip_norm, foreach=True)
        optimizer.step()
        return loss.item()

    return update


def prediction(network: UniAD, features: dict[str, Tensor], compiled: bool = False) -> Callable[[], np.ndarray]:
    """Return a function that computes the error map of the first image, shape (1, m, m).

    Args:
        network: The network, which is set to evaluation.
        features: Shape (b, p, f), by modality.
        compiled: Whether to compile the error map.
    """
    network.eval()
    image = {m: tokens[:1] for m, tokens in features.items()}
    error_map = torch.compile(network.error_map) if compiled else network.error_map

    @torch.inference_mode()
    def predict() -> np.ndarray:
        return error_map(image).numpy()

    return predict
