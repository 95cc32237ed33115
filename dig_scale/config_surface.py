"""Sections of a recipe for surfaces: a slab with an adsorbate to build, and the calculator that moves it.

In: plain data. Out: frozen pydantic models; an unknown key is an error. Knows no ASE.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Facet = Literal["fcc111", "fcc100", "fcc110", "bcc110", "hcp0001"]
CalculatorName = Literal["emt", "tblite", "pyscf"]
_Count = Annotated[int, Field(gt=0)]
_Positive = Annotated[float, Field(gt=0)]


class SurfaceSpec(BaseModel):
    """A slab with one adsorbate, built by ASE: `metal` is its element, `size` its cells along the surface and its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metal: str
    facet: Facet = "fcc111"
    size: tuple[_Count, _Count, _Count] = (2, 2, 4)
    lattice_constant: _Positive | None = None
    """Å; when absent the equilibrium of effective medium theory for the fcc metals it knows, else ASE's tabulated value."""
    lattice_constant_c: _Positive | None = None
    """Å; of hcp metals, with the same default."""
    vacuum: _Positive = 14.0
    """Å between the slab and its next image along the third vector."""
    fixed_layers: int = Field(default=2, ge=0)
    """Layers at the bottom that do not move."""
    adsorbate: str | None = "O"
    """An element, or the name of a molecule known to ase.build.molecule; none leaves a clean slab."""
    site: str = "fcc"
    """ASE's name of the site: ontop, bridge, fcc, hcp, hollow, shortbridge or longbridge, as the facet has them."""
    height: _Positive = 1.2
    """Å; of the adsorbate's lowest atom above the top layer."""


class CalculatorSpec(BaseModel):
    """What gives energies and forces: effective medium theory, GFN-xTB (tblite), or density functional theory (pyscf)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: CalculatorName = "emt"
    method: Literal["GFN1-xTB", "GFN2-xTB"] = "GFN1-xTB"
    """Of tblite."""
    electronic_temperature: _Positive = 300.0
    """K; of tblite's occupations."""
    functional: str = "pbe"
    """Of pyscf, as are those below."""
    basis: str = "gth-szv"
    """Of periodic systems; it goes with `pseudopotential`."""
    pseudopotential: str = "gth-pade"
    molecule_basis: str = "def2-svp"
    """Of systems without periodic directions, all electrons."""
    kpoints: tuple[_Count, _Count, _Count] = (1, 1, 1)
    cutoff_hartree: _Positive | None = None
    """Plane-wave cutoff of the density's grid; PySCF's own choice, which is fine and slow, when absent."""
    smearing_ev: _Positive | None = None
    """Fermi smearing of the occupations: metals need it."""
