"""A known structure of a protein as pair features: Gaussians of its C-alpha distances, as AlphaFold bins a template's.

In: a protein and a file of coordinates. Out: features of every pair that the structure has; 0 where a residue is missing
there or is another. They say what is near what and nothing of handedness or place, so that a model still has to fold the
chain. Chains are taken in their order, residues by sequence alignment (gemmi), so that numbering does not matter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers.backbone import read_backbone
from dig_scale.system import System

CENTRES = np.arange(4.0, 52.0, 2.0)
"""Å; of Gaussians as wide as they lie apart."""
LEAST_IDENTITY = 0.5
"""Share of the protein's residues that a template must have."""


def template_features(system: System, path: Path) -> np.ndarray:
    """[N, N, 24] float32 from the first model of a PDB or mmCIF file.

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
    positions = frames.positions[0][rows[there]]
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    width = CENTRES[1] - CENTRES[0]
    features = np.zeros((system.n_sites, system.n_sites, len(CENTRES)), np.float32)
    features[np.ix_(there, there)] = np.exp(-0.5 * ((distance[..., None] - CENTRES) / width) ** 2)
    return features


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
