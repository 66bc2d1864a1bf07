"""Small parts of the transformers of DETR and Deformable DETR."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., sizes[0]) -> (..., sizes[-1])."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    @property
    def last(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.last(x)


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between them: (..., C) -> (..., C)."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class Attention(nn.MultiheadAttention):
    """Multi-head attention, tokens (B, N, C), without the weights that nobody reads."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__(channels, heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """Queries (B, Q, C), keys and values (B, N, C), ``padding`` (B, N) True where not to look -> (B, Q, C)."""
        return super().forward(query, key, value, key_padding_mask=padding, need_weights=False)[0]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of probabilities, which are kept ``eps`` away from 0 and 1."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def init_matrices(module: nn.Module) -> None:
    """Xavier initialisation of every matrix, as both papers have it."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def check_sizes(channels: int, heads: int, decoder_layers: int) -> None:
    """Refuse widths that neither the heads nor the position embedding divide, and a decoder without layers.

    Raises:
        ValueError: with what to choose.
    """
    if channels % heads or channels % 4:
        raise ValueError(f"channels={channels} with heads={heads}: channels must be a multiple of 4 and of the heads")
    if decoder_layers < 1:
        raise ValueError(f"decoder_layers={decoder_layers}: the predictions come from decoder layers, use 1 or more")
