"""Small systems written by hand, shared by tests that need a molecule but no engine."""

from __future__ import annotations

import numpy as np

from dig_scale.system import System, SystemKind

_ALANINE_HEAVY = {  # Å; C7eq-like geometry
    "ACE CH3": (0.000, 0.000, 0.000),
    "ACE C": (1.507, 0.000, 0.000),
    "ACE O": (2.114, 1.066, 0.000),
    "ALA N": (2.092, -1.196, 0.000),
    "ALA CA": (3.535, -1.345, 0.050),
    "ALA CB": (3.950, -2.220, 1.240),
    "ALA C": (4.140, -1.950, -1.220),
    "ALA O": (3.480, -2.150, -2.250),
    "NME N": (5.440, -2.220, -1.150),
    "NME CH3": (6.170, -2.800, -2.270),
}
_BONDS = [(0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (4, 6), (6, 7), (6, 8), (8, 9)]


def alanine_dipeptide_heavy() -> System:
    """Ten heavy atoms of ACE-ALA-NME, L at C-alpha."""
    names = list(_ALANINE_HEAVY)
    positions = np.array(list(_ALANINE_HEAVY.values()))
    centre, n, c, cb = 4, 3, 6, 5
    a, b, d = (positions[k] - positions[centre] for k in (n, c, cb))
    order = (n, c, cb) if a @ np.cross(b, d) > 0 else (n, cb, c)
    return System(
        name="ala2-heavy",
        kind=SystemKind.MOLECULE,
        elements=[{"C": 6, "O": 8, "N": 7}[name.split()[1][0]] for name in names],
        atom_names=tuple(name.split()[1] for name in names),
        residue_names=tuple(name.split()[0] for name in names),
        residue_index=[0] * 3 + [1] * 5 + [2] * 2,
        chain_index=[0] * 10,
        bonds=_BONDS,
        bond_orders=[1, 2, 1, 1, 1, 1, 2, 1, 1],
        formal_charges=[0] * 10,
        stereocentres=[(centre, *order)],
        mobile=[True] * 10,
        reference_positions=positions,
    )


def five_beads() -> System:
    """Backbone beads C N CA C N of alanine dipeptide: no site has four neighbours."""
    heavy = alanine_dipeptide_heavy().select([1, 3, 4, 6, 8])
    content = heavy.to_dict() | {"name": "beads", "elements": [0] * 5}
    return System.from_dict(content)
