"""Toys as systems: any toy of toys.py with the Composition, Context and exact ScoreFn that samplers, densities, guidance,
steering and physics-informed training take, and with the energy as a potential of positions.

    toy = toy_system(MuellerBrown(kT=15))
    state = toy.state(toy.toy.sample(100, generator))     # State with positions [100, 1, 3]
    score = toy.score_fn(state, toy.context, t)           # exact at every noise
    u = toy.reduced_energy(state.positions)               # [100] kT; toy.log_z is exact

The D coordinates of a toy lie in sites of three; coordinates over, where D is no multiple of 3, are standard normals at the
end. The sites have their anchor at the origin and are not free, so that every coordinate counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.config import Diffusion
from dig_scale.diffusion.composition import Composition, positions_alone
from dig_scale.toys import Toy, WithNormals

EXACT_NOISE = Diffusion(schedule="log-linear", noise_min=1e-3, noise_max=1e5)
"""So little noise at t = 0, and so little left of the data at t = 1, that neither end shows in a log-density."""


@dataclass(frozen=True)
class ToySystem:
    """A toy (padded to D = 3 N coordinates) behind the interfaces of a system; also a potential, whose kT is 1 eV."""

    toy: Toy
    composition: Composition
    context: Context
    score_fn: ScoreFn

    @property
    def log_z(self) -> float:
        """Of the padded coordinates, nat."""
        return self.toy.log_z

    @property
    def kT_ev(self) -> float:
        """1: toys have their energies in kT."""
        return 1.0

    def state(self, x: Tensor) -> State:
        """State of coordinates [B, D]; a toy's own coordinates alone [B, d] get zeros behind them."""
        missing = self.toy.dimension - x.shape[1]
        return State(torch.cat([x, x.new_zeros(len(x), missing)], dim=1).view(len(x), -1, 3))

    def coordinates(self, positions: Tensor) -> Tensor:
        """[B, D] of positions [B, N, 3]."""
        return positions.flatten(1)

    def reduced_energy(self, positions: Tensor) -> Tensor:
        """u [B] in kT of positions [B, N, 3], differentiable."""
        return self.toy.reduced_energy(positions.flatten(1))

    def log_density(self, positions: Tensor) -> Tensor:
        """Exact normalised log-density [B] of clean positions [B, N, 3], nat."""
        return -self.reduced_energy(positions) - self.log_z


def toy_system(toy: Toy, diffusion: Diffusion = EXACT_NOISE) -> ToySystem:
    """A toy as a system under the schedule of `diffusion`."""
    missing = -toy.dimension % 3
    padded: Toy = WithNormals(toy, missing) if missing else toy
    composition = positions_alone(diffusion)
    process = composition.fields["positions"].process

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        assert state.positions is not None
        flat = state.positions.flatten(1)
        level = process.coefficients(t.double())
        found = padded.noised_score(flat, level.alpha.to(flat), level.sigma.to(flat))
        return Score(positions=found.view_as(state.positions))

    return ToySystem(padded, composition, anchored_context(padded.dimension // 3), score_fn)


def anchored_context(n_sites: int) -> Context:
    """Context (b = 1) of sites without features about an anchor at the origin, so that translations count."""
    codes = torch.zeros(1, n_sites, dtype=torch.long)
    pairs = torch.zeros(1, n_sites, n_sites, dtype=torch.long)
    there = torch.ones(1, n_sites, dtype=torch.bool)
    return Context(
        present=there,
        mobile=there,
        element=codes,
        degree=codes,
        environment=codes,
        role=codes,
        place=codes,
        pair_segment=pairs,
        path_length=pairs,
        bond_order=pairs,
        pair_reference=pairs.float(),
        anchor=torch.zeros(1, n_sites, 3),
        extent=torch.ones(1, n_sites),
        free=torch.zeros(1, dtype=torch.bool),
        cell=torch.zeros(1, 3, 3),
        periodic=torch.zeros(1, 3, dtype=torch.bool),
        condition=torch.zeros(1, 0),
        known=torch.zeros(1, 0, dtype=torch.bool),
        site_features=torch.zeros(1, n_sites, 0),
        pair_features=torch.zeros(1, n_sites, n_sites, 0),
    )
