"""One training step of a score model on a synthetic chain molecule, as the trainer makes it, on one device.

The molecule is a chain of N sites in a random-walk conformation; all samples of a batch are conformations of it, so its
static features are made once. Noise and times are drawn once: what is timed is the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench import gpu_declared as declared
from bench.gpu_timing import Bench
from torch import Tensor

from dig_scale.batch import Batch, Context, Geometry, Score, State
from dig_scale.config import Diffusion, Model
from dig_scale.diffusion.composition import Composition, composition_for
from dig_scale.model.score_model import ScoreModel
from dig_scale.objectives.denoising import denoising_loss, draw_times
from dig_scale.recipe_files import load_recipe
from dig_scale.system import SystemKind
from dig_scale.training.metrics import Throughput, peak_flops
from dig_scale.tree import tree_map, tree_to

BOND = 1.5
"""Å between neighbours of the chain."""
SMALL = {"layers": 1, "width": 48, "heads": 2, "feed_forward": 48, "radial_kernels": 4, "vector_channels": 4}
"""Model of a rehearsal."""


@dataclass(frozen=True)
class Training:
    """What is trained and how: samples of the molecule, in `micro_batches` equal parts."""

    bench: Bench
    model: Model
    compiled: bool
    sites: int
    batch: int
    micro_batches: int = 1

    @property
    def throughput(self) -> Throughput:
        """Counts of the FLOP formula."""
        peak = peak_flops(self.bench.device, "bf16") if self.bench.on_gpu else 1e12
        return Throughput(site_parameters(self.model), self.model.layers, self.model.width, peak)

    @property
    def flops(self) -> float:
        """FLOP of a step."""
        return self.batch * self.throughput.flops_of(self.sites)

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s of the device."""
        return self.throughput.peak_flops

    def build_step(self) -> Callable[[], None]:
        """A fresh model and optimiser; each call is a step."""
        torch.manual_seed(0)
        device = self.bench.device
        network = ScoreModel(self.model).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=self.bench.on_gpu)
        if self.compiled:  # the geometry stays as it is: under a compiler it would fall back to the reference
            network.trunk = self.bench.compiled(network.trunk)
        composition = composition_for(SystemKind.MOLECULE, Diffusion())
        parts = [part.to(device) for part in micro_batches(self, composition)]

        def answer(seen: Geometry, context: Context, noise_std: Tensor) -> Score:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bench.on_gpu):
                score: Score = network(seen, context, noise_std)
            return tree_map(Tensor.float, score)

        def step() -> None:
            optimiser.zero_grad()
            for part in parts:
                losses = denoising_loss(answer, composition, part.batch, part.times, part.noise)
                (losses.sum() / self.batch).backward()
            optimiser.step()

        return step


@dataclass(frozen=True)
class Part:
    """A micro-batch with its times [b] and noise."""

    batch: Batch
    times: Tensor
    noise: State

    def to(self, device: torch.device) -> Part:
        """A copy on `device`."""
        return tree_to(self, device)


def micro_batches(training: Training, composition: Composition) -> list[Part]:
    """The parts of a batch, on the processor."""
    context, positions = chain(training.sites)
    generator = torch.Generator().manual_seed(0)
    times = draw_times(training.batch, "antithetic", generator)
    parts = []
    for part in times.split(-(-training.batch // training.micro_batches)):
        state = State(positions.expand(len(part), -1, -1).contiguous())
        normals = torch.randn(len(part), composition.normals(context), generator=generator)
        noise = composition.noise(normals, context)
        parts.append(Part(Batch(state, context, ("chain",) * len(part)), part, noise))
    return parts


def chain(sites: int) -> tuple[Context, Tensor]:
    """Context (b = 1) and centred positions [1, N, 3] in Å of a chain molecule, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(sites, 3, generator=generator)
    positions = (BOND * steps / steps.norm(dim=1, keepdim=True)).cumsum(0)
    positions = positions - positions.mean(0)
    index, codes = torch.arange(sites), torch.zeros(1, sites, dtype=torch.long)
    lengths = (index[:, None] - index).abs()[None]
    context = Context(
        present=torch.ones(1, sites, dtype=torch.bool),
        mobile=torch.ones(1, sites, dtype=torch.bool),
        element=torch.tensor([1, 6, 7, 8])[torch.randint(4, (1, sites), generator=generator)],
        degree=(lengths == 1).sum(-1),
        environment=torch.randint(1, 1024, (1, sites), generator=generator),
        role=codes,
        place=codes,
        pair_segment=lengths.clamp(max=4),
        path_length=lengths,
        bond_order=(lengths == 1).long(),
        pair_reference=torch.cdist(positions, positions)[None],
        anchor=torch.zeros(1, sites, 3),
        extent=positions.square().mean().sqrt().expand(1, sites),
        free=torch.ones(1, dtype=torch.bool),
        cell=torch.zeros(1, 3, 3),
        periodic=torch.zeros(1, 3, dtype=torch.bool),
        condition=torch.zeros(1, 0),
        known=torch.zeros(1, 0, dtype=torch.bool),
        site_features=torch.zeros(1, sites, 0),
        pair_features=torch.zeros(1, sites, sites, 0),
    )
    return context, positions[None]


def site_parameters(model: Model) -> int:
    """Parameters that multiply every site's token: those of trunk and heads but for the modulation, once per sample."""
    with torch.device("meta"):
        named = list(ScoreModel(model).named_parameters())
    per_site = ("trunk.", "head.", "node_feature.")
    return sum(p.numel() for name, p in named if name.startswith(per_site) and ".modulation." not in name)


def training_for(bench: Bench, model: str, length: int, subject: str) -> Training:
    """The training of a case and subject of gpu_declared."""
    paper: Model = load_recipe("paper").model
    deep = {"layers": 24, "feed_forward": 3072} if model == declared.DEEP else {}
    kernels = "reference" if subject == declared.REFERENCE else "triton"
    small = {} if bench.on_gpu else SMALL
    config = paper.model_copy(update={**deep, **small, "kernels": kernels})
    lengths = bench.sizes.samples_of(length)
    return Training(bench, config, subject == declared.FUSED_COMPILED, lengths[0], len(lengths))
