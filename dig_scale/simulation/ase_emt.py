"""Effective medium theory for many copies of one periodic cell at once, equal to ASE's EMT to rounding.

In: elements, cell, periodic directions, which atoms do not move, and positions [W, N, 3] Å of W walkers. Out: energies
[W] eV and forces [W, N, 3] eV/Å, in double precision; and, for steps of dynamics, forces in single precision from lists
of near pairs that a few walkers share and keep while no atom has moved half a skin. Pairs of atoms that both stand
still enter the dynamics as constants. A walker's numbers do not depend on who is beside it.

Jacobsen, Stoltze, Nørskov, Surf. Sci. 366 (1996) 394; parameters and cutoff as in ase.calculators.emt.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT, beta, parameters
from ase.data import chemical_symbols
from scipy.sparse import csr_matrix

from dig_scale.simulation.engine import SimulationError

_SKIN = 0.8
"""Å; lists hold pairs this much beyond the cutoff."""
_SMALLEST_DENSITY = 1e-250
_WALKERS_AT_ONCE = 32
"""Walkers that share a list; their arrays fit a core's cache together."""


@dataclass(frozen=True)
class _Species:
    """Parameters of the elements that occur, each [K], by ASE's names, and the density ratios chi [K, K]."""

    values: dict[str, np.ndarray]
    chi: np.ndarray
    cutoff: float
    midpoint: float
    slope: float


@dataclass(frozen=True)
class _Block:
    """Pairs of one pair of species: rows of the pair table, first (s) and second (o) species."""

    rows: slice
    s: int
    o: int


@dataclass(frozen=True)
class _Pairs:
    """Undirected pairs [P] of atoms i and images of atoms j, grouped by species.

    offset [P, 3] Å is the vector from i to the image of j at the reference; first and second [N, P] add pair values onto i
    and j; sigma [N] and energy are what pairs that are left out contribute. Its precision is that of all pair values.
    """

    i: np.ndarray
    j: np.ndarray
    offset: np.ndarray
    blocks: tuple[_Block, ...]
    first: csr_matrix
    second: csr_matrix
    sigma: np.ndarray
    energy: float


@dataclass(frozen=True)
class _Listed:
    """A list of near pairs, and the moves [W, N, 3] Å of the walkers that it was made for."""

    pairs: _Pairs
    moves: np.ndarray


class EMTPotential:
    """The potential of one cell; raises SimulationError naming elements that have no parameters.

    elements [N], cell [3, 3] Å, reference [N, 3] Å where the atoms that are not mobile [N] stand.
    """

    def __init__(
        self,
        name: str,
        elements: np.ndarray,
        cell: np.ndarray,
        periodic: tuple[bool, bool, bool],
        reference: np.ndarray,
        mobile: np.ndarray,
    ) -> None:
        require_emt_elements(name, elements)
        self._cell, self._periodic, self._mobile = np.asarray(cell, float), np.asarray(periodic), mobile
        self._species, self._of_atom = _species(elements)
        self._reference = reference - np.floor(self._fractional(reference)) @ self._cell
        self._i, self._j = np.triu_indices(len(elements))
        self._steps = _translations(self._cell, self._periodic, self._species.cutoff + _SKIN)
        self._frozen = self._sums_of_frozen()
        self._lists: dict[int, _Listed] = {}

    def energy_and_forces(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies [W] eV and forces [W, N, 3] eV/Å on all atoms, at positions [W, N, 3] Å."""
        moves = self._moves(positions)
        energy, forces = np.empty(len(moves)), np.empty_like(moves)
        everyone = np.ones(len(self._i), bool)
        for part in _parts(len(moves)):
            rows, offset = self._near(moves[part], everyone, 0.0)
            pairs = _pair_table(rows, offset, self._of_atom, np.zeros(len(self._reference)), 0.0)
            energy[part], forces[part] = _energy_and_forces(pairs, self._species, self._of_atom, moves[part])
        return energy, forces

    def mobile_forces(self, positions: np.ndarray) -> np.ndarray:
        """Forces [W, N, 3] eV/Å in single precision, right for atoms that move; those on others are left incomplete."""
        moves = self._moves(positions)
        forces = np.empty_like(moves)
        for part in _parts(len(moves)):
            pairs = self._listed(part.start, moves[part])
            forces[part] = _energy_and_forces(pairs, self._species, self._of_atom, moves[part])[1]
        return forces

    def _moves(self, positions: np.ndarray) -> np.ndarray:
        """Moves [W, N, 3] Å from the reference, each of the image within half a cell of it."""
        moves = positions - self._reference
        return np.asarray(moves - np.round(self._fractional(moves)) @ self._cell)

    def _fractional(self, vectors: np.ndarray) -> np.ndarray:
        return np.where(self._periodic, vectors @ np.linalg.inv(self._cell), 0.0)

    def _listed(self, place: int, moves: np.ndarray) -> _Pairs:
        held = self._lists.get(place)
        if held is not None and held.moves.shape == moves.shape:
            farthest = ((moves - held.moves) ** 2).sum(axis=-1).max()
            if farthest < (_SKIN / 2) ** 2:
                return held.pairs
        rows, offset = self._near(moves, self._mobile[self._i] | self._mobile[self._j], _SKIN)
        pairs = _pair_table(rows, offset.astype(np.float32), self._of_atom, *self._frozen)
        self._lists[place] = _Listed(pairs, moves)
        return pairs

    def _sums_of_frozen(self) -> tuple[np.ndarray, float]:
        """What pairs of atoms that stand still contribute to the densities [N] and to the energy in eV."""
        still = ~(self._mobile[self._i] | self._mobile[self._j])
        rows, offset = self._near(np.zeros((1, *self._reference.shape)), still, 0.0)
        pairs = _pair_table(rows, offset, self._of_atom, np.zeros(len(self._reference)), 0.0)
        terms = _PairTerms(pairs, self._species, np.linalg.norm(pairs.offset, axis=1)[:, None])
        sigma = pairs.first @ terms.density_s + pairs.second @ terms.density_o
        return sigma[:, 0], float(terms.energy.sum())

    def _near(self, moves: np.ndarray, chosen: np.ndarray, skin: float) -> tuple[np.ndarray, np.ndarray]:
        """Pairs [P, 2] among `chosen` closer than the cutoff and a skin for any walker, and their offsets [P, 3] Å."""
        i, j = self._i[chosen], self._j[chosen]
        between = self._reference[j] - self._reference[i]
        vectors = between + moves[:, j] - moves[:, i]
        shifts = self._steps @ self._cell
        # |v + s|² for all translations s at once
        squared = (vectors**2).sum(axis=-1)[..., None] + 2 * (vectors @ shifts.T) + (shifts**2).sum(axis=1)
        near = (squared < (self._species.cutoff + skin) ** 2).any(axis=0)
        # of an atom and its own images, one of each opposite pair; none is the atom itself
        near &= (i != j)[:, None] | self._is_later[None]
        pair, step = np.nonzero(near)
        return np.stack([i[pair], j[pair]], axis=1), between[pair] + shifts[step]

    @property
    def _is_later(self) -> np.ndarray:
        return np.arange(len(self._steps)) > len(self._steps) // 2


def require_emt_elements(name: str, elements: np.ndarray) -> None:
    """Raises SimulationError naming the elements of a system that effective medium theory has no parameters for."""
    missing = sorted({chemical_symbols[z] for z in elements} - set(parameters))
    if missing:
        raise SimulationError(
            f"system {name!r}: effective medium theory has no parameters for {', '.join(missing)} (it has "
            f"{', '.join(parameters)}); choose another calculator"
        )


def _species(elements: np.ndarray) -> tuple[_Species, np.ndarray]:
    model = EMT()
    model.initialize(Atoms(numbers=elements))
    values = {name: np.array(model.par[name]) for name in model.par}
    cutoff = float(model.rc_list)
    return _Species(values, np.array(model.chi), cutoff, float(model.rc), float(model.acut)), np.array(model.ia2iz)


def _translations(cell: np.ndarray, periodic: np.ndarray, reach: float) -> np.ndarray:
    """Integer translations [T, 3] that any pair may need, ordered so that opposite ones mirror about the middle."""
    # reference and move each lie within a cell, so fractions of two atoms differ by less than two
    counts = np.where(periodic, np.floor(reach * np.linalg.norm(np.linalg.inv(cell), axis=0) + 2), 0).astype(int)
    return np.array(list(itertools.product(*(range(-n, n + 1) for n in counts))))


def _parts(walkers: int) -> list[slice]:
    return [slice(start, start + _WALKERS_AT_ONCE) for start in range(0, walkers, _WALKERS_AT_ONCE)]


def _pair_table(rows: np.ndarray, offset: np.ndarray, of_atom: np.ndarray, sigma: np.ndarray, energy: float) -> _Pairs:
    kind = of_atom[rows]
    code = kind[:, 0] * (int(of_atom.max()) + 1) + kind[:, 1]
    order = np.argsort(code, kind="stable")
    i, j, kind = rows[order, 0], rows[order, 1], kind[order]
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    ends = np.r_[starts[1:], len(i)][: len(starts)]
    blocks = tuple(
        _Block(slice(int(a), int(b)), int(kind[a, 0]), int(kind[a, 1])) for a, b in zip(starts, ends, strict=True)
    )
    first, second = (_adder(atoms, len(of_atom), offset.dtype) for atoms in (i, j))
    return _Pairs(i, j, offset[order], blocks, first, second, sigma, energy)


def _adder(atoms: np.ndarray, n_atoms: int, dtype: np.dtype) -> csr_matrix:
    """The matrix [N, P] that adds values of pairs onto their atoms [P], in the order of the pairs."""
    order = np.argsort(atoms, kind="stable")
    ends = np.r_[0, np.cumsum(np.bincount(atoms, minlength=n_atoms))]
    return csr_matrix((np.ones(len(atoms), dtype), order, ends), shape=(n_atoms, len(atoms)))


def _energy_and_forces(
    pairs: _Pairs, species: _Species, of_atom: np.ndarray, moves: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Energies [W] and forces [W, N, 3] at moves [W, N, 3] Å from the reference; inside, walkers are the last axis."""
    walkers, n = moves.shape[:2]
    vectors, distance = _vectors(pairs, moves)
    terms = _PairTerms(pairs, species, distance)
    sigma = pairs.first @ terms.density_s + pairs.second @ terms.density_o + pairs.sigma[:, None]
    energies, slope = _embedding(species, of_atom, sigma)
    slope = slope.astype(distance.dtype)
    radial = terms.radial(np.take(slope, pairs.i, axis=0), np.take(slope, pairs.j, axis=0))
    vectors *= radial[:, None]
    pushes = vectors.reshape(-1, 3 * walkers)
    forces = (pairs.first @ pushes - pairs.second @ pushes).reshape(n, 3, walkers)
    # sums of sparse rows and of a list are taken in one order, however many walkers there are
    energy = sum(energies + pairs.first @ terms.energy, np.full(walkers, pairs.energy))
    return energy, forces.transpose(2, 0, 1)


def _vectors(pairs: _Pairs, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [P, 3, W] from i to the image of j, and their lengths [P, W], both in Å."""
    table = moves.transpose(1, 2, 0).astype(pairs.offset.dtype, order="C")
    vectors = np.take(table, pairs.j, axis=0)
    vectors -= np.take(table, pairs.i, axis=0)
    vectors += pairs.offset[:, :, None]
    # written out: einsum adds in another order when there is one walker
    squared = vectors[:, 0] ** 2
    squared += vectors[:, 1] ** 2
    squared += vectors[:, 2] ** 2
    return vectors, np.sqrt(squared, out=squared)


class _PairTerms:
    """What pairs at distances [P, W] Å add: density_s to i and density_o to j, energy [P, W] eV, and their slopes."""

    def __init__(self, pairs: _Pairs, species: _Species, distance: np.ndarray) -> None:
        self._blocks, self._values, self._distance = pairs.blocks, species.values, distance
        fade = np.minimum(distance, species.cutoff)
        fade -= species.midpoint
        fade *= species.slope
        np.exp(fade, out=fade)
        fade += 1
        np.reciprocal(fade, out=fade)
        self._fade_slope = species.slope * (fade - 1)
        fade *= distance < species.cutoff
        self.density_s, self.density_o = np.empty_like(distance), np.empty_like(distance)
        self._pair_s, self._pair_o = np.empty_like(distance), np.empty_like(distance)
        for block in pairs.blocks:
            self._fill(block, species, fade[block.rows])
        self.energy = self._pair_s + self._pair_o

    def _fill(self, block: _Block, species: _Species, fade: np.ndarray) -> None:
        rows, s, o, chi = block.rows, block.s, block.o, float(species.chi[block.s, block.o])
        r = self._distance[rows]
        self.density_s[rows], self._pair_s[rows] = self._tails(r, o, s, fade * chi)
        if s == o:
            self.density_o[rows], self._pair_o[rows] = self.density_s[rows], self._pair_s[rows]
        else:
            self.density_o[rows], self._pair_o[rows] = self._tails(r, s, o, fade / chi)

    def _tails(self, r: np.ndarray, giver: int, taker: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Density and pair energy that atoms of species `giver` bring to atoms of species `taker`."""
        value = {name: float(values[giver]) for name, values in self._values.items()}
        scale = float(self._values["neghalfv0overgamma2"][taker])
        return (
            _tail(r, value["eta2"], beta * value["s0"], weight),
            _tail(r, value["kappa"] / beta, beta * value["s0"], weight) * scale,
        )

    def radial(self, slope_i: np.ndarray, slope_j: np.ndarray) -> np.ndarray:
        """dE/dr / r [P, W] in eV/Å² for slopes dE/dsigma [P, W] of the atoms i and j."""
        result = np.empty_like(self._distance)
        for block in self._blocks:
            rows = block.rows
            eta, kappa = self._values["eta2"].tolist(), (self._values["kappa"] / beta).tolist()
            fade, s, o = self._fade_slope[rows], block.s, block.o
            if s == o:
                total = (slope_i[rows] + slope_j[rows]) * self.density_s[rows] * (fade - eta[s])
                total += self.energy[rows] * (fade - kappa[s])
            else:
                total = slope_i[rows] * self.density_s[rows] * (fade - eta[o])
                total += slope_j[rows] * self.density_o[rows] * (fade - eta[s])
                total += self._pair_s[rows] * (fade - kappa[o]) + self._pair_o[rows] * (fade - kappa[s])
            result[rows] = total
        result /= self._distance
        return result


def _tail(r: np.ndarray, decay: float, start: float, weight: np.ndarray) -> np.ndarray:
    """weight exp(-decay (r - start)) in few passes."""
    values = r - start
    values *= -decay
    np.exp(values, out=values)
    values *= weight
    return values


def _embedding(species: _Species, of_atom: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies [N, W] eV of atoms in densities sigma [N, W], counted from free atoms, and dE/dsigma [N, W]."""
    of = {name: values[of_atom][:, None] for name, values in species.values.items()}
    density = np.maximum(sigma, _SMALLEST_DENSITY)
    ds = -np.log(density * of["inv12gamma1"]) / (beta * of["eta2"])
    bound = np.exp(-of["lambda"] * ds)
    repulsion = 6 * of["V0"] * np.exp(-of["kappa"] * ds)
    energy = of["E0"] * (1 + of["lambda"] * ds) * bound + repulsion - of["E0"]
    slope = (of["E0"] * of["lambda"] ** 2 * ds * bound + of["kappa"] * repulsion) / (beta * of["eta2"] * density)
    return energy, slope
