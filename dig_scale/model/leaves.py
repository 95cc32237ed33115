"""Leaf modules that initialise their own parameters.

A parent that re-initialises its children's parameters is silently ignored where parameters are already partitioned
(ZeRO-3), so every departure from PyTorch's defaults stands in the leaf that owns the parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ELEMENTS = 119
"""Atomic numbers, with 0 for what is no atom."""
NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)
GROUPS, F_BLOCK = 18, 14


class NormalEmbedding(nn.Embedding):
    """Embedding with entries N(mean, std²)."""

    def __init__(self, entries: int, width: int, std: float, mean: float = 0.0) -> None:
        self.std, self.mean = std, mean
        super().__init__(entries, width)

    def reset_parameters(self) -> None:
        """Draw the entries."""
        nn.init.normal_(self.weight, mean=self.mean, std=self.std)


class ElementEmbedding(nn.Module):
    """Atomic numbers [...] (0: a bead) -> [..., D], the sum of a vector of the period and one of the group.

    So an element that no training system holds is what others of its row and of its column make of it.
    """

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        places = torch.tensor([(0, 0), *(_period_and_group(number) for number in range(1, ELEMENTS))])
        self.register_buffer("places", places, persistent=False)
        self.period = NormalEmbedding(len(NOBLE_GASES) + 1, width, std)
        self.group = NormalEmbedding(GROUPS + F_BLOCK + 1, width, std)

    def forward(self, elements: Tensor) -> Tensor:
        """[..., D]."""
        places = self.places[elements]  # type: ignore[index]
        return self.period(places[..., 0]) + self.group(places[..., 1])


def _period_and_group(number: int) -> tuple[int, int]:
    """Row and column of an element; the 14 elements after lanthanum and actinium have columns of their own."""
    period = 1 + sum(number > noble for noble in NOBLE_GASES[:-1])
    begin, end = (0, *NOBLE_GASES)[period - 1 : period + 1]
    place, before_last = number - begin, end - number
    if place <= 2 and before_last:
        return period, place
    if end - begin == GROUPS + F_BLOCK and place <= 3 + F_BLOCK:
        return period, place if place == 3 else GROUPS + place - 3
    return period, GROUPS - before_last


class SmallLinear(nn.Linear):
    """Linear layer with weights N(0, 0.02²) and zero bias."""

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FeatureReader(nn.Module):
    """Features [..., C] of another network, whatever their scale -> [..., K]: a layer norm, then `linear`."""

    def __init__(self, count: int, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(count)
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        """In the precision of the weights."""
        return self.linear(self.norm(features.to(self.linear.weight.dtype)))


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
