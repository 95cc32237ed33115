"""Leaf modules that initialise their own parameters.

A parent that re-initialises its children's parameters is silently ignored where parameters are already partitioned
(ZeRO-3), so every departure from PyTorch's defaults stands in the leaf that owns the parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormalEmbedding(nn.Embedding):
    """Embedding with entries N(mean, std²)."""

    def __init__(self, entries: int, width: int, std: float, mean: float = 0.0) -> None:
        self.std, self.mean = std, mean
        super().__init__(entries, width)

    def reset_parameters(self) -> None:
        """Draw the entries."""
        nn.init.normal_(self.weight, mean=self.mean, std=self.std)


class SmallLinear(nn.Linear):
    """Linear layer with weights N(0, 0.02²) and zero bias."""

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Modulation(nn.Linear):
    """Condition [B, D] -> shift, scale, gate of two sub-layers, [B, 6D]; gates start near 1, shifts and scales near 0."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 6 * width)

    def reset_parameters(self) -> None:
        """Draw the weights; set the gates' biases to 1."""
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            width = self.in_features
            self.bias.zero_()
            self.bias[2 * width : 3 * width] = 1.0
            self.bias[5 * width :] = 1.0


class ChannelMix(nn.Module):
    """Linear map over channels of vectors, [B, 3, M, N] -> [B, 3, K, N]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels) * channels**-0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        """The mixed vectors; commutes with rotations."""
        return self.weight @ vectors
