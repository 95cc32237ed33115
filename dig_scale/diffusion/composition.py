"""SystemKind -> {state field: Process}, and the parametrisation that makes a network a score.

A Composition is the door between arrays of Frames and the State that diffuses, and between the State and the network:
positions count from the anchors of the context (a free molecule has its centre of mass there and stays, noise included,
in the subspace of zero centre of mass; immobile sites have no noise), a cell becomes the six coordinates of its
logarithm. The network sees Geometry, absolute and on the scale of the data, and answers with numbers F of order 1 per
field, which parametrisation.py turns into scores. Samplers and objectives know fields only through what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry, Score, ScoreFn, State, fields_of
from dig_scale.config import Diffusion
from dig_scale.diffusion.euclidean import centred, vp
from dig_scale.diffusion.parametrisation import CellCoordinates, CleanEstimate, Parametrisation, ScaledScore
from dig_scale.diffusion.periodic import WrappedNormal
from dig_scale.diffusion.process import Process
from dig_scale.diffusion.rotation import RotationProcess
from dig_scale.diffusion.schedule import LogLinear, schedule_from
from dig_scale.errors import UserError
from dig_scale.geometry.lattice import softly_folded
from dig_scale.system import SiteRole, SystemKind

Network = Callable[[Geometry, Context, Tensor], Score]
"""(geometry in Å on the scale of the data, context, noise level [B] Å) -> numbers of order 1, one field per state field."""

Arrays = Mapping[str, Tensor]
"""Fields of Frames by name: positions [B,N,3] Å, rotations [B,N,3,3], cell [B,3,3] Å."""


@dataclass(frozen=True)
class Field:
    """One diffusing field: its process, and how the network's answer becomes its score."""

    process: Process
    parametrisation: Parametrisation


@dataclass(frozen=True)
class Composition:
    """The fields of one kind of system, by name; `stored` are the fields of Frames that it takes and gives."""

    fields: Mapping[str, Field]
    stored: tuple[str, ...]
    coordinates: CellCoordinates

    def state(self, arrays: Arrays, context: Context, place: Tensor | None = None) -> State:
        """The clean State of stored frames.

        Loose sites of a periodic cell (adsorbates) are brought near their anchors by a lattice translation, which `place`
        [B] in [0, 1) chooses (see geometry.lattice.softly_folded); without it they stay in the image that is stored.
        """
        values: dict[str, Tensor] = {}
        if "positions" in self.fields and place is not None and bool(context.periodic.any()):
            values["positions"] = constrained_positions(self._folded(arrays["positions"], context, place), context)
        elif "positions" in self.fields:
            values["positions"] = constrained_positions(arrays["positions"] - context.anchor, context)
        if "rotations" in self.fields:
            values["rotations"] = arrays["rotations"]
        if "lattice" in self.fields:
            values |= self.coordinates.of_crystal(arrays["positions"], arrays["cell"], context.present)
        return State(**values)

    def _folded(self, positions: Tensor, context: Context, place: Tensor) -> Tensor:
        loose = (context.role == SiteRole.ADSORBATE).expand(len(positions), -1)
        cell = context.cell.expand(len(positions), 3, 3)
        periodic = tuple(bool(value) for value in context.periodic[0])
        width = float(context.extent[context.role == SiteRole.ADSORBATE].max()) if bool(loose.any()) else 1.0
        return softly_folded(positions - context.anchor, loose, cell, periodic, width, place)  # type: ignore[arg-type]

    def arrays(self, state: State, context: Context) -> dict[str, Tensor]:
        """Stored frames of a clean State: inverse of `state`."""
        seen = self._geometry(state, context)
        found = {"positions": seen.positions, "rotations": seen.rotations, "cell": seen.cell}
        return {name: value for name, value in found.items() if value is not None}

    def normals(self, context: Context) -> int:
        """Standard normals that one noise of a sample takes."""
        return sum(6 if name == "lattice" else 3 * context.n_sites for name in self.fields)

    def noise(self, normals: Tensor, context: Context) -> State:
        """Noise of the state's fields from standard normals [B, normals(context)], restricted to what may move."""
        values, first = {}, 0
        for name in self.fields:
            width = 6 if name == "lattice" else 3 * context.n_sites
            part = normals[:, first : first + width]
            values[name] = part if name == "lattice" else part.reshape(len(part), -1, 3)
            first += width
        return self.constrained(State(**values), context)

    def constrained(self, noise: State, context: Context) -> State:
        """Noise or tangents restricted to what may move; free molecules keep their centre of mass."""
        values = fields_of(noise)
        for name in ("rotations", "fractional"):
            if name in values:
                values[name] = moving(values[name], context)
        if "positions" in values:
            values["positions"] = constrain(values["positions"], context)
        return State(**values)

    def perturb(self, state: State, t: Tensor, noise: State) -> State:
        """Noised state at t [B]."""
        return self._each(lambda name, field: field.process.perturb(_of(state, name), t, _of(noise, name)))

    def prior(self, noise: State) -> State:
        """State at t = 1 from standard noise."""
        return self._each(lambda name, field: field.process.sample_prior(_of(noise, name)))

    def noise_level(self, t: Tensor) -> Tensor:
        """Noise of the first field on the scale of the data, [B]: what the network is told of t."""
        level = next(iter(self.fields.values())).process.coefficients(t)
        return level.sigma / level.alpha

    def seen(self, state: State, context: Context, t: Tensor) -> Geometry:
        """What the network sees of a noised state."""
        scaled = self._each(lambda name, field: field.parametrisation.seen(_of(state, name), field.process, t))
        return self._geometry(scaled, context)

    def scores(self, network: Network, state: State, context: Context, t: Tensor) -> Score:
        """The network's scores of all fields."""
        answer = network(self.seen(state, context, t), context, self.noise_level(t))
        return Score(
            **{
                name: field.parametrisation.score(_answer(answer, name), _of(state, name), field.process, t, context)
                for name, field in self.fields.items()
            }
        )

    def as_score_fn(self, network: Network) -> ScoreFn:
        """The score function of a network."""

        def score_fn(state: State, context: Context, t: Tensor) -> Score:
            return self.scores(network, state, context, t)

        return score_fn

    def errors(self, network: Network, state: State, context: Context, t: Tensor, noise: State) -> dict[str, Tensor]:
        """Mean squared error [B] of the network's answer for every field, over what moves, at the noised `state`."""
        noised = self.perturb(state, t, noise)
        answer = network(self.seen(noised, context, t), context, self.noise_level(t))
        found = {}
        for name, field in self.fields.items():
            rows = (_of(state, name), _of(noised, name))
            error = _answer(answer, name) - field.parametrisation.target(*rows, field.process, t, context)
            found[name] = (error**2).mean(-1) if name == "lattice" else _mean_over_sites(name, error, context)
        return found

    def _geometry(self, state: State, context: Context) -> Geometry:
        if state.lattice is not None:
            assert state.fractional is not None
            cell = self.coordinates.cell(state.lattice, context.present)
            return Geometry(state.fractional @ cell, cell=cell)
        assert state.positions is not None
        return Geometry(state.positions + context.anchor, state.rotations)

    def _each(self, function: Callable[[str, Field], Tensor]) -> State:
        return State(**{name: function(name, field) for name, field in self.fields.items()})


Build = Callable[[Diffusion], Composition]


def composition_for(kind: str, config: Diffusion) -> Composition:
    """The fields of a kind of system under a recipe's schedules; raises UserError for a kind that has no entry."""
    if kind not in COMPOSITIONS:
        raise UserError(f"no diffusion process for systems of kind {kind!r}; known kinds: {', '.join(COMPOSITIONS)}")
    return COMPOSITIONS[kind](config)


def positions_alone(config: Diffusion) -> Composition:
    """Atoms or beads in R³, about their anchors."""
    return _composition({"positions": Field(vp(schedule_from(config)), CleanEstimate())}, ("positions",), config)


def residue_frames(config: Diffusion) -> Composition:
    """C-alpha positions in R³ and residue rotations on SO(3), as in DiG."""
    rotations = RotationProcess(config.rotation_noise_min, config.rotation_noise_max)
    fields = {
        "positions": Field(vp(schedule_from(config)), CleanEstimate()),
        "rotations": Field(rotations, ScaledScore(rotations.score_scale)),
    }
    return _composition(fields, ("positions", "rotations"), config)


def crystal(config: Diffusion) -> Composition:
    """Fractional coordinates on the torus, and the logarithm of the cell."""
    wrapped = WrappedNormal(config.fractional_noise_min, config.fractional_noise_max)
    fields = {
        "fractional": Field(wrapped, ScaledScore(wrapped.score_scale)),
        "lattice": Field(vp(LogLinear(config.lattice_noise_min, config.lattice_noise_max)), CleanEstimate()),
    }
    return _composition(fields, ("positions", "cell"), config)


def _composition(fields: Mapping[str, Field], stored: tuple[str, ...], config: Diffusion) -> Composition:
    return Composition(fields, stored, CellCoordinates(config.volume_per_site, config.lattice_spread))


COMPOSITIONS: dict[str, Build] = {
    SystemKind.PROTEIN: residue_frames,
    SystemKind.MOLECULE: positions_alone,
    SystemKind.CATALYST: positions_alone,
    SystemKind.CRYSTAL: crystal,
}
"""One entry per kind of system."""


def sites_of(composition: Composition, context: Context) -> str:
    """What a network must read and answer for these fields and this system: a value of config.Model.sites."""
    if "rotations" in composition.fields:
        return "residues"
    if "lattice" in composition.fields:
        return "crystal"
    return "atoms" if bool(context.free.all()) else "anchored"


def require_sites(composition: Composition, context: Context, sites: str, system: str) -> None:
    """Raises UserError where a model of config.Model.sites = `sites` cannot answer for a system."""
    needed = sites_of(composition, context)
    if needed != sites:
        raise UserError(f"system {system!r} needs a model with model.sites = {needed!r}, this one has {sites!r}")


def constrain(vectors: Tensor, context: Context) -> Tensor:
    """Vectors [B, N, 3] with fixed and absent sites at 0 and, for free molecules, zero mean."""
    still = moving(vectors, context)
    return torch.where(context.free[:, None, None], centred(still, context.present), still)


def constrained_positions(offsets: Tensor, context: Context) -> Tensor:
    """Offsets [B, N, 3] from the anchors with free molecules centred (unit masses) and absent sites at 0."""
    there = torch.where(context.present.unsqueeze(-1), offsets, offsets.new_zeros(()))
    return torch.where(context.free[:, None, None], centred(offsets, context.present), there)


def moving(vectors: Tensor, context: Context) -> Tensor:
    """Vectors [B, N, 3] with fixed and absent sites at 0."""
    return torch.where((context.mobile & context.present).unsqueeze(-1), vectors, vectors.new_zeros(()))


def _mean_over_sites(name: str, error: Tensor, context: Context) -> Tensor:
    kept = constrain(error, context) if name == "positions" else moving(error, context)
    sites = (context.mobile & context.present).sum(1).clamp(min=1)
    return (kept**2).flatten(1).sum(1) / (3 * sites)


def _of(state: State, name: str) -> Tensor:
    value = getattr(state, name)
    assert value is not None
    return value


def _answer(score: Score, name: str) -> Tensor:
    value = getattr(score, name)
    assert value is not None, f"the network has no answer for {name}"
    return value
