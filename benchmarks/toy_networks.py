"""What the networks of learned toys share: Fourier features damped by noise, a perceptron behind them, and their training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

LEARNING_RATE = 3e-3
N = TypeVar("N", bound=nn.Module)


class FourierPerceptron(nn.Module):
    """Multilayer perceptron on further inputs and the Fourier features of a toy's own coordinates.

    In: coordinates [B, d] about their mean, squared noise levels [B, 1], further inputs [B, inputs]. Out: [B, outputs]. Features
    are damped by noise as the density is.
    """

    waves: Tensor

    def __init__(self, dimension: int, inputs: int, outputs: int, width: int, features: int = 48) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = torch.exp(torch.rand(features, 1, generator=generator) * math.log(16.0)) * 0.5
        direction = nn.functional.normalize(torch.randn(features, dimension, generator=generator), dim=1)
        self.register_buffer("waves", size * direction)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(2 * features + inputs, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, outputs),
            )

    def forward(self, own: Tensor, n2: Tensor, further: Tensor) -> Tensor:
        """[B, outputs]."""
        phase, damping = own @ self.waves.mT, torch.exp(-0.5 * n2 * (self.waves**2).sum(1))
        found: Tensor = self.net(torch.cat([further, damping * phase.sin(), damping * phase.cos()], dim=1))
        return found


def trained(network: N, loss_of: Callable[[int], Tensor], steps: int, average: float) -> N:
    """The network with averaged weights after `steps` of AdamW in one cycle of learning rates; loss_of(step) is of it."""
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
    return cast(N, averaged.module)
