"""ReferenceSet, the molecular dynamics that an ensemble is measured against, and the matching of its sites.

In: a System and Frames per trajectory, however they were read. Out: frames ordered by trajectory and time, and, for an
ensemble's system, the reference sites in the ensemble's order. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dig_scale.errors import UserError
from dig_scale.system import Frames, System

MIN_MATCHED_SITES = 4
_NAMED_IN_ERROR = 6


@dataclass(frozen=True)
class ReferenceSet:
    """Equilibrium frames of `system`: positions [F, N, 3] Å, trajectory [F] labels, time_ps [F], energy [F] eV or None.

    Frames are ordered by trajectory, then time. temperature in K is that of the simulation. Raises UserError on bad shapes.
    """

    system: System
    positions: np.ndarray
    trajectory: np.ndarray
    time_ps: np.ndarray
    energy: np.ndarray | None = None
    temperature: float = 300.0
    source: str = ""

    def __post_init__(self) -> None:
        n_frames = len(self.positions)
        if self.positions.shape != (n_frames, self.system.n_sites, 3) or n_frames < 2:
            expected = f"(2 or more, {self.system.n_sites}, 3)"
            raise UserError(f"reference {self._name}: positions {self.positions.shape}, expected {expected} in Å")
        for name in ("trajectory", "time_ps", "energy"):
            values = getattr(self, name)
            if values is not None and len(values) != n_frames:
                raise UserError(f"reference {self._name}: {name} has {len(values)} entries for {n_frames} frames")
        bad = np.flatnonzero(~np.isfinite(self.positions).all(axis=(1, 2)))
        if len(bad):
            found = f"{len(bad)} of {n_frames} frames have positions that are not finite, the first is frame {bad[0]}"
            raise UserError(f"reference {self._name}: {found}; remove them from the trajectory")

    @property
    def n_frames(self) -> int:
        """Number of frames F."""
        return len(self.positions)

    @property
    def _name(self) -> str:
        return self.source or repr(self.system.name)


def reference_from_frames(
    system: System, trajectories: Sequence[Frames], temperature: float = 300.0, source: str = ""
) -> ReferenceSet:
    """ReferenceSet of one System from the Frames of one or more trajectories (each its own label), sorted by time.

    Energies (eV) are kept when every trajectory has them; temperature in K. Raises UserError when there are no frames.
    """
    if not trajectories:
        raise UserError(f"reference {source or repr(system.name)}: no trajectory given")
    orders = [np.argsort(frames.time_ps, kind="stable") for frames in trajectories]
    energies = [frames.energy for frames in trajectories]
    energy = None
    if all(values is not None for values in energies):
        energy = np.concatenate([np.asarray(v)[order] for v, order in zip(energies, orders, strict=True)])
    pairs = list(zip(trajectories, orders, strict=True))
    return ReferenceSet(
        system=system,
        positions=np.concatenate([frames.positions[order] for frames, order in pairs]).astype(np.float32),
        trajectory=np.repeat(np.arange(len(trajectories)), [frames.n_frames for frames in trajectories]),
        time_ps=np.concatenate([frames.time_ps[order] for frames, order in pairs]),
        energy=energy,
        temperature=temperature,
        source=source,
    )


def ordered_by_time(reference: ReferenceSet) -> ReferenceSet:
    """The same frames, those of a trajectory adjacent and in time order."""
    order = np.lexsort((reference.time_ps, reference.trajectory))
    return replace(
        reference,
        positions=reference.positions[order],
        trajectory=reference.trajectory[order],
        time_ps=reference.time_ps[order],
        energy=None if reference.energy is None else reference.energy[order],
    )


def match_sites(system: System, reference: System) -> np.ndarray:
    """Reference site [N] of every site of `system`, by residue index, residue name and atom name (and chain if needed).

    Raises UserError that names sites which the reference lacks, or when fewer than MIN_MATCHED_SITES match.
    """
    missing: list[int] = []
    if _same_names(system, reference):
        sites = np.arange(system.n_sites)
    else:
        sites, missing = _sites_by_name(system, reference)
    if missing or len(sites) < MIN_MATCHED_SITES:
        raise UserError(_mismatch(system, reference, missing))
    return sites


def first_halves(trajectory: np.ndarray) -> np.ndarray:
    """Which frames [F] lie in the first half of their trajectory; frames of a trajectory adjacent, in time order."""
    in_first = np.zeros(len(trajectory), bool)
    for label in np.unique(trajectory):
        frames = np.flatnonzero(trajectory == label)
        in_first[frames[: len(frames) // 2]] = True
    return in_first


def _same_names(first: System, second: System) -> bool:
    names = first.atom_names == second.atom_names and first.residue_names == second.residue_names
    return names and np.array_equal(first.elements, second.elements)


def _sites_by_name(system: System, reference: System) -> tuple[np.ndarray, list[int]]:
    """Reference sites of the sites that have one, and the sites that have none."""
    keys = {False: (_short_keys(system), _short_keys(reference)), True: (_long_keys(system), _long_keys(reference))}
    ambiguous = any(len(set(names)) < len(names) for names in keys[False])
    own, others = keys[ambiguous]
    for described, names in ((system, own), (reference, others)):
        _require_unique(described, names)
    where = {key: index for index, key in enumerate(others)}
    sites = [where[key] for key in own if key in where]
    return np.array(sites, dtype=np.int64), [index for index, key in enumerate(own) if key not in where]


def _short_keys(system: System) -> list[tuple[object, ...]]:
    return list(zip(system.residue_index.tolist(), system.residue_names, system.atom_names, strict=True))


def _long_keys(system: System) -> list[tuple[object, ...]]:
    return [(chain, *key) for chain, key in zip(system.chain_index.tolist(), _short_keys(system), strict=True)]


def _require_unique(system: System, keys: list[tuple[object, ...]]) -> None:
    seen: set[tuple[object, ...]] = set()
    for index, key in enumerate(keys):
        if key in seen:
            raise UserError(
                f"system {system.name!r}: {system.site_label(index)} has the name of another site, so sites cannot be"
                " matched by residue and atom name; give atoms unique names"
            )
        seen.add(key)


def _mismatch(system: System, reference: System, missing: Sequence[int]) -> str:
    matched = system.n_sites - len(missing)
    listed = ", ".join(system.site_label(index) for index in missing[:_NAMED_IN_ERROR])
    more = f" and {len(missing) - _NAMED_IN_ERROR} more" if len(missing) > _NAMED_IN_ERROR else ""
    found = f"the reference {reference.name!r} lacks {listed}{more}" if missing else "too few sites to compare"
    return (
        f"ensemble of {system.name!r}: {found}; {matched} of {system.n_sites} sites match by residue index, residue name and"
        f" atom name, at least {MIN_MATCHED_SITES} and all of the ensemble's are needed: give a reference of the same molecule"
        " that has these atoms"
    )
