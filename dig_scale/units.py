"""Units inside dig-scale: Å, eV, ps, K, e, amu. The only physical constants of the project stand here.

Source of the values: CODATA 2018 (exact by the 2019 redefinition of the SI where no uncertainty is given).
Conversions happen at a door (engine, importer, writer); everywhere else a foreign unit wears a suffix (`_nm`, `_kj_mol`).
"""

from __future__ import annotations

BOLTZMANN_EV_PER_K = 8.617333262145e-5
AVOGADRO = 6.02214076e23
ELEMENTARY_CHARGE_C = 1.602176634e-19

EV_PER_KJ_MOL = 1e3 / (AVOGADRO * ELEMENTARY_CHARGE_C)
EV_PER_KCAL_MOL = 4.184 * EV_PER_KJ_MOL
ANGSTROM_PER_NM = 10.0
EV_PER_ANGSTROM_PER_KJ_MOL_NM = EV_PER_KJ_MOL / ANGSTROM_PER_NM
EV_PER_ANGSTROM3_PER_GPA = 1e-21 / ELEMENTARY_CHARGE_C
PS_PER_FS = 1e-3
PS_PER_NS = 1e3
SECONDS_PER_DAY = 86400.0


def thermal_energy(temperature: float) -> float:
    """kT in eV at `temperature` in K."""
    return BOLTZMANN_EV_PER_K * temperature
