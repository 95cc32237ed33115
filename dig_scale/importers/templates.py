"""A known structure of a protein as features: of pairs Gaussians of C-alpha distances, as AlphaFold bins a template's, and of
residues where they lie in it and how they are turned.

In: a protein and a file of coordinates. Out: features of every residue and pair that the structure has; 0 where a residue is
missing there or is another. Places are along the structure's principal axes about its centre, so that it does not matter how
it lay in its file. Chains are taken in their order, residues by sequence alignment (gemmi), so numbering does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers.backbone import read_backbone
from dig_scale.system import System
from dig_scale.template_layout import LENGTH, PLACES, TEMPLATE_FEATURES, TURNS, WAVELENGTHS, WAVES

CENTRES = np.arange(4.0, 52.0, 2.0)
"""Å; of Gaussians as wide as they lie apart."""
PAIR_FEATURES = len(CENTRES)
LEAST_IDENTITY = 0.5
"""Share of the protein's residues that a template must have."""


@dataclass(frozen=True)
class TemplateFeatures:
    """float32; site [N, 42] as template_layout says; pair [N, N, 24]: Gaussians of distances."""

    site: np.ndarray
    pair: np.ndarray


def template_features(system: System, path: Path) -> TemplateFeatures:
    """Features from the first model of a PDB or mmCIF file.

    Raises UserError naming the file where it has fewer than half of the system's residues.
    """
    template, frames = read_backbone(path.stem, [path])
    rows = _rows(system, template)
    there = np.flatnonzero(rows >= 0)
    if len(there) < LEAST_IDENTITY * system.n_sites:
        raise UserError(
            f"{path}: {len(there)} of the {system.n_sites} residues of system {system.name!r} align with it; a template "
            "needs half of them, in chains of the same order"
        )
    assert frames.rotations is not None
    positions, rotations = frames.positions[0], frames.rotations[0]
    axes = _principal_axes(positions)
    places, turns = (positions - positions.mean(0)) @ axes, (axes.T @ rotations).reshape(len(rotations), 9)
    site = np.zeros((system.n_sites, TEMPLATE_FEATURES), np.float32)
    for columns, values in ((WAVES, _waves(places)), (TURNS, turns), (PLACES, places / LENGTH)):
        site[there, columns] = values[rows[there]]
    pair = np.zeros((system.n_sites, system.n_sites, PAIR_FEATURES), np.float32)
    pair[np.ix_(there, there)] = _gaussians(positions[rows[there]])
    return TemplateFeatures(site, pair)


def _gaussians(positions: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    return np.asarray(np.exp(-0.5 * ((distance[..., None] - CENTRES) / (CENTRES[1] - CENTRES[0])) ** 2))


def _waves(places: np.ndarray) -> np.ndarray:
    """Sines and cosines [N, 30] of coordinates [N, 3] in Å."""
    angle = 2 * np.pi * places[..., None] / np.array(WAVELENGTHS)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(places), -1)


def _principal_axes(positions: np.ndarray) -> np.ndarray:
    """Axes [3, 3] in columns, right-handed, longest first; the first two point to where positions reach out further."""
    centred = positions - positions.mean(0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    heavier = np.sign(((centred @ axes) ** 3).sum(0))
    axes = axes * np.where(heavier == 0, 1.0, heavier)
    return np.stack([axes[:, 0], axes[:, 1], np.cross(axes[:, 0], axes[:, 1])], axis=1)


def _rows(system: System, template: System) -> np.ndarray:
    """Residue of the template for every one of the system, -1 where there is none or another."""
    import gemmi

    rows = np.full(system.n_sites, -1)
    for chain in np.intersect1d(system.chain_index, template.chain_index):
        sites, others = (np.flatnonzero(one.chain_index == chain) for one in (system, template))
        names, known = ([one.residue_names[k] for k in ours] for one, ours in ((system, sites), (template, others)))
        aligned = gemmi.align_string_sequences(names, known, [])
        here, there = (aligned.add_gaps("x" * len(side), which) for side, which in ((names, 1), (known, 2)))
        i = j = 0
        for ours, theirs in zip(here, there, strict=True):
            if ours != "-" and theirs != "-" and names[i] == known[j]:
                rows[sites[i]] = others[j]
            i, j = i + (ours != "-"), j + (theirs != "-")
    return rows
