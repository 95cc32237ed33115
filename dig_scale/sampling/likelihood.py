"""Log-density of clean states by the probability-flow ODE (flow.py), with exact or estimated divergence.

    log p(y) = log prior(x_1) + integral of div(dx/dt) from t = 0 to 1 + D log alpha(0)
(Song et al. 2021, eq. 39), where the last term turns the density of x_0 = alpha(0) y into that of y, coordinates on the scale
of the data. It is the density of the model: that of the data with the noise of t = 0 on it.

The path needs no divergence, which costs as much as D calls of the network and is integrated over t alone. So with adaptive
steps the path is integrated first and the divergence is taken at the nodes of a Clenshaw-Curtis rule (Trefethen 2008), whose
number is doubled until the integral stays. Fixed steps carry the integral with them.

What it is a density against, with D counted likewise:
positions   Lebesgue on the coordinates of mobile sites, Å; for free molecules on the subspace of zero centre of mass, in
            orthonormal coordinates (3 less). Fixed sites condition.
rotations   Haar measure of mass 1, per mobile residue. Against the volume d³v of a rotation vector v at the identity (Haar's
            density there is 1/(8 pi²) rad^-3) it is lower by log(8 pi²) = 4.3686 nat a residue.
fractional  Lebesgue on the unit torus, per mobile site.
lattice     Lebesgue on the six coordinates of State.lattice; symmetric_cell_log_volume turns it into a density of cells.

The divergence is a trace over infinitesimal displacements of Process.move, in the order of Composition.noise: exp in the local
frame for rotations, so that the fields e_i are left-invariant and, the group being unimodular, d log p/dt = -sum_i e_i(w_i)
against Haar. Displacements and tangents are both restricted by the composition, so the trace is that on the subspace. One
forward pass serves all vector-Jacobian products; first derivatives of the network are all it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State, fields_of
from dig_scale.diffusion.composition import Composition, constrain
from dig_scale.errors import UserError
from dig_scale.sampling import flow
from dig_scale.sampling.flow import Integration, Values
from dig_scale.sampling.noise import counter_normal
from dig_scale.tree import leading_size, tree_select

Counts = Mapping[str, Tensor]
"""Degrees of freedom [b] by field."""

_FEWEST_NODES, _MOST_NODES = 16, 1024
"""Orders of the quadrature, powers of two."""
_CONVERGENCE = 8.0
"""A doubling is not believed to lower the change by more than that."""
_ON_A_PROCESSOR, _ON_A_GPU = 64, 4096
"""Vector-Jacobian products at once."""


@dataclass(frozen=True)
class Exact:
    """The divergence as a full trace: one vector-Jacobian product per degree of freedom and row, `chunk` of them at once but one
    per row at least (a processor is fastest with what its caches hold; None: as the device likes it)."""

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise UserError(f"chunk of the exact divergence is {self.chunk}; expected 1 or more")


@dataclass(frozen=True)
class Hutchinson:
    """The divergence as a mean over random probes (Hutchinson 1990; Grathwohl et al. 2019), the same along all of a path.

    Probes depend on seed, row and number alone. Two at least, so that there is a standard error.
    """

    probes: int = 8
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.probes < 2 or (self.chunk is not None and self.chunk < 1):
            raise UserError(f"{self}: expected 2 probes or more (one has no error bar) and a chunk of 1 or more")
        if self.distribution not in ("rademacher", "gaussian"):
            raise UserError(f"unknown distribution {self.distribution!r} of probes; expected rademacher or gaussian")


@dataclass(frozen=True)
class LikelihoodSettings:
    """How the ODE is integrated and its divergence taken; with adaptive steps the nodes of the integral of the divergence are
    doubled until that changes it by `tolerance` nat at most."""

    integration: Integration = field(default_factory=Integration)
    divergence: Exact | Hutchinson = field(default_factory=Exact)
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise UserError(f"the tolerance of a log-density is {self.tolerance} nat; expected more than 0")


@dataclass(frozen=True)
class LogDensity:
    """log_density [B] nat, its standard_error [B] from the probes (0 where the divergence is exact), the state at t = 1,
    how often the score function was called, and by how much [B] (nat) the last doubling of the nodes changed the integral of
    the divergence (0 of fixed steps, which do not tell)."""

    log_density: Tensor
    standard_error: Tensor
    latent: State
    evaluations: int
    last_change: Tensor


def log_density(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    settings: LikelihoodSettings = LikelihoodSettings(),
) -> LogDensity:
    """Log-density of clean states; see the module's header for the measures. float64.

    Raises UserError where no site may move, or where the result is not finite.
    """
    counts = degrees_of_freedom(composition, context)
    _require_degrees(counts)
    calls = _Counted(score_fn)
    probe = _Probe(calls, composition, context, state, settings.divergence)
    if settings.integration.method == "dopri5":
        ended, gained, change = _by_quadrature(probe, counts, settings)
    else:
        ended, gained, change = _by_steps(probe, counts, settings)
    fixed = _prior(composition, context, ended, counts)
    for name in _plain(composition, counts):
        fixed = fixed + counts[name] * math.log(flow.clean_scale(composition, name))
    estimates = gained + fixed.unsqueeze(-1)
    _require_finite(estimates)
    error = estimates.std(1) / math.sqrt(probe.columns) if probe.columns > 1 else torch.zeros_like(fixed)
    return LogDensity(estimates.mean(1), error, flow.on_manifold(ended, state), calls.count, change)


def _by_steps(probe: _Probe, counts: Counts, settings: LikelihoodSettings) -> tuple[Values, Tensor, Tensor]:
    """Values at t = 1, the integral of the divergence [B, columns], and no idea of its error [B]."""
    composition = probe.composition
    values = flow.starting_values(composition, probe.like)

    def slope(t: Tensor, now: Values, gained: Tensor) -> tuple[Values, Tensor]:
        tangent, divergence = probe(now, t)
        return flow.derivatives(composition, now, tangent, t), divergence + _spreading(composition, counts, t)

    first = next(iter(values.values()))
    nothing = torch.zeros(len(first), probe.columns, dtype=torch.float64, device=first.device)
    ended, gained = flow.integrate(slope, values, nothing, 0.0, 1.0, settings.integration)
    return ended, gained, torch.zeros_like(gained[:, 0])


def _by_quadrature(probe: _Probe, counts: Counts, settings: LikelihoodSettings) -> tuple[Values, Tensor, Tensor]:
    """Values at t = 1, the integral of the divergence [B, columns], and its change [B] by the last doubling of the nodes.

    Rows whose integral stays are done.
    """
    rows = len(next(iter(fields_of(probe.like).values())))
    found, ended = _divergences(probe, counts, _nodes(_FEWEST_NODES), settings)
    order = _FEWEST_NODES
    integral = _clenshaw_curtis(found)
    change = (integral - _clenshaw_curtis(found[::2])).mean(1).abs()
    active = torch.arange(rows, device=integral.device)
    while len(active) and order < _MOST_NODES:
        order *= 2
        between, _ = _divergences(probe.take(active), _taken(counts, active), _nodes(order)[1::2], settings)
        merged = found.new_empty(order + 1, *found.shape[1:])
        merged[::2], merged[1::2] = found, between
        finer = _clenshaw_curtis(merged)
        # two coarse rules may agree by chance, three do not
        change[active] = torch.maximum((finer - integral[active]).mean(1).abs(), change[active] / _CONVERGENCE)
        integral[active] = finer
        going_on = ~(change[active] <= settings.tolerance)
        active, found = active[going_on], merged[:, going_on]
    return ended, integral, change


def _divergences(probe: _Probe, counts: Counts, times: Tensor, settings: LikelihoodSettings) -> tuple[Tensor, Values]:
    """Divergence of the flow at rising times, [T, B, columns], and the values at the last of them."""
    times = times.to(next(iter(counts.values())).device)
    from_zero = times if times[0] == 0 else torch.cat([torch.zeros_like(times[:1]), times])
    path = flow.path(probe.score_fn, probe.composition, probe.context, probe.like, from_zero, settings.integration)
    values = path[-len(times) :]
    found = [probe(now, t)[1] + _spreading(probe.composition, counts, t) for now, t in zip(values, times, strict=True)]
    return torch.stack(found), values[-1]


def _nodes(order: int) -> Tensor:
    """The order + 1 nodes in [0, 1] of the Clenshaw-Curtis rule, rising; every other one is of half the order."""
    return 0.5 - 0.5 * torch.cos(math.pi * torch.arange(order + 1, dtype=torch.float64) / order)


def _clenshaw_curtis(values: Tensor) -> Tensor:
    """The integral over [0, 1] of the interpolant of values [N + 1, ...] at _nodes(N), N even."""
    order = len(values) - 1
    k = torch.arange(0, order + 1, 2, dtype=torch.float64)
    j = torch.arange(order + 1, dtype=torch.float64)
    cosines = torch.cos(math.pi * torch.outer(j, k) / order) / (1 - k**2)
    cosines[:, 1:-1] *= 2
    weights = cosines.sum(1) / order
    weights[0] /= 2
    weights[-1] /= 2
    return torch.einsum("n,n...->...", weights.to(values), values)


def _spreading(composition: Composition, counts: Counts, t: Tensor) -> Tensor:
    """Divergence [b, 1] of the drifts: where alpha falls it nearly cancels the score's, so the two are added before they are
    integrated."""
    drifts = [
        composition.fields[name].process.coefficients(t).drift * counts[name] for name in _plain(composition, counts)
    ]
    first = next(iter(counts.values()))
    return (torch.stack(drifts).sum(0) if drifts else torch.zeros_like(first)).unsqueeze(-1)


def _plain(composition: Composition, counts: Counts) -> tuple[str, ...]:
    return tuple(name for name in counts if flow.is_plain(composition, name))


def _taken(counts: Counts, rows: Tensor) -> Counts:
    return {name: count if len(count) == 1 else count[rows] for name, count in counts.items()}


def degrees_of_freedom(composition: Composition, context: Context) -> dict[str, Tensor]:
    """Degrees of freedom [b] of every field."""
    sites = (context.mobile & context.present).sum(1).double()
    counts = {name: 6 + 0 * sites if name == "lattice" else 3 * sites for name in composition.fields}
    if "positions" in counts:
        counts["positions"] = counts["positions"] - 3 * context.free.double()
    return counts


def symmetric_cell_log_volume(composition: Composition, lattice: Tensor, context: Context) -> Tensor:
    """log |d cell/d lattice| [B] of the symmetric cell (Å, Lebesgue in six orthonormal coordinates of symmetric matrices).

    log p(cell) = log p(lattice) - this. By the eigenvalues l of the logarithm: an exponential stretches the plane of i and j
    by (e^li - e^lj)/(li - lj), and the axes by e^li.
    """
    coordinates = composition.coordinates
    cell = coordinates.cell(lattice.double(), context.present)
    logs = torch.log(torch.linalg.eigvalsh(cell))
    total = logs.sum(-1) + 6 * math.log(coordinates.spread)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        half = 0.5 * (logs[:, j] - logs[:, i])
        # (e^a - e^b)/(a - b) = e^((a + b)/2) sinh(h)/h with h half their difference
        ratio = torch.where(half.abs() < 1e-4, 1 + half**2 / 6, torch.sinh(half) / half.clamp(min=1e-4))
        total = total + 0.5 * (logs[:, i] + logs[:, j]) + torch.log(ratio)
    return total


@dataclass
class _Counted:
    """A score function that counts its calls."""

    score_fn: ScoreFn
    count: int = 0

    def __call__(self, state: State, context: Context, t: Tensor) -> Score:
        self.count += 1
        return self.score_fn(state, context, t)


@dataclass(frozen=True)
class _Probe:
    """The tangents at (values, t) and estimates [B, columns] of their divergence."""

    score_fn: ScoreFn
    composition: Composition
    context: Context
    like: State
    divergence: Exact | Hutchinson
    places: Tensor | None = None
    """Rows of the batch that these are, which probes depend on; all of them where None."""

    def take(self, rows: Tensor) -> _Probe:
        """The same of some rows."""
        context = self.context if leading_size(self.context) == 1 else tree_select(self.context, rows)
        places = rows if self.places is None else self.places[rows]
        return replace(self, context=context, like=tree_select(self.like, rows), places=places)

    @property
    def columns(self) -> int:
        """Independent estimates: one where exact."""
        return 1 if isinstance(self.divergence, Exact) else self.divergence.probes

    def __call__(self, values: Values, t: Tensor) -> tuple[Values, Tensor]:
        state = flow.on_manifold(values, self.like)
        first = next(iter(fields_of(state).values()))
        with torch.enable_grad():
            displacement = first.new_zeros(len(first), self.composition.normals(self.context)).requires_grad_()
            moved = self._moved(state, displacement)
            tangent = flow.tangents(self.score_fn, self.composition, self.context, moved, t)
            flat = torch.cat([part.flatten(1) for part in tangent.values()], dim=1)
            found = self._trace(flat, displacement)
        return {name: part.detach() for name, part in tangent.items()}, found.double()

    def _moved(self, state: State, displacement: Tensor) -> State:
        steps = fields_of(self.composition.noise(displacement, self.context))
        processes = self.composition.fields
        return State(**{name: processes[name].process.move(x, steps[name]) for name, x in fields_of(state).items()})

    def _trace(self, flat: Tensor, displacement: Tensor) -> Tensor:
        rows_at_once = self.divergence.chunk or (_ON_A_GPU if flat.is_cuda else _ON_A_PROCESSOR)
        at_once = max(1, rows_at_once // len(flat))
        if isinstance(self.divergence, Exact):
            total = flat.new_zeros(len(flat))
            for places in self._moving.split(at_once):
                unit = torch.nn.functional.one_hot(places, flat.shape[1]).to(flat)
                products = _products(flat, displacement, unit.unsqueeze(1).expand(-1, len(flat), -1))
                total = total + torch.einsum("kbn,kn->b", products, unit)
            return total.unsqueeze(1)
        parts = [
            (_products(flat, displacement, probes) * probes).sum(-1) for probes in self._probes.to(flat).split(at_once)
        ]
        return torch.cat(parts).mT

    @cached_property
    def _moving(self) -> Tensor:
        """Places of the coordinates, in the order of Composition.noise, that move in any row."""
        sites = (self.context.mobile & self.context.present).any(0).repeat_interleave(3)
        there = [
            torch.ones_like(sites[:1]).expand(6) if name == "lattice" else sites for name in self.composition.fields
        ]
        return torch.cat(there).nonzero().squeeze(1)

    @cached_property
    def _probes(self) -> Tensor:
        """[K, B, coordinates]."""
        assert isinstance(self.divergence, Hutchinson)
        first = next(iter(fields_of(self.like).values()))
        rows = torch.arange(len(first), device=first.device) if self.places is None else self.places
        seed, width = torch.full_like(rows, self.divergence.seed), self.composition.normals(self.context)
        normals = torch.stack(
            [counter_normal(seed, rows, torch.full_like(rows, k), width) for k in range(self.divergence.probes)]
        )
        return normals if self.divergence.distribution == "gaussian" else torch.where(normals < 0, -1.0, 1.0)


def _products(outputs: Tensor, inputs: Tensor, vectors: Tensor) -> Tensor:
    """Vector-Jacobian products [K, B, n] of vectors [K, B, n], all at once where the operations of the network allow it."""
    if len(vectors) > 1:
        try:
            return torch.autograd.grad(outputs, inputs, vectors, is_grads_batched=True, retain_graph=True)[0]
        except RuntimeError:
            # an operation without a batched backward (a fused kernel), or memory for one product only
            pass
    return torch.stack([torch.autograd.grad(outputs, inputs, vector, retain_graph=True)[0] for vector in vectors])


def _prior(composition: Composition, context: Context, ended: Values, counts: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(len(next(iter(ended.values()))), dtype=torch.float64, device=context.present.device)
    for name, value in ended.items():
        kept = constrain(value, context) if name == "positions" else value
        total = total + composition.fields[name].process.prior_log_density(kept, counts[name])
    return total


def _require_degrees(counts: dict[str, Tensor]) -> None:
    total = torch.stack(list(counts.values())).sum(0)
    if bool((total <= 0).any()):
        raise UserError("no degree of freedom to take a density over: no mobile site (or a free system of one site)")


def _require_finite(estimates: Tensor) -> None:
    bad = (~torch.isfinite(estimates)).any(1).nonzero().squeeze(1).tolist()
    if bad:
        raise UserError(
            f"log-density of {len(bad)} of {len(estimates)} states is not finite (first: row {bad[0]}): take more steps or "
            "smaller tolerances, and check that the structures are complete and in Å"
        )
