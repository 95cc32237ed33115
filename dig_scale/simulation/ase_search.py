"""A random structure search as a recipe names it: composition, limits and calculator -> a store of relaxed crystals.

In: a config.StructureSearch and a folder. Out: what structure_search makes of it, OUT/<formula>/<formula>.zarr; a search
that was stopped goes on.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dig_scale.config import StructureSearch
from dig_scale.errors import UserError
from dig_scale.importers.crystal import crystal_system
from dig_scale.simulation.ase_emt import require_emt_elements
from dig_scale.simulation.ase_relaxation import Relaxation
from dig_scale.simulation.calculators import calculator_named, method_of
from dig_scale.simulation.structure_search import Search, SearchReport, search_structures
from dig_scale.units import EV_PER_ANGSTROM3_PER_GPA

_PART = re.compile(r"([A-Z][a-z]?)([0-9]*)")


def search_crystals(spec: StructureSearch, out: Path) -> SearchReport:
    """Run the search of a recipe's entry in `out`, or carry it on.

    Raises UserError for a composition that is none, elements or stresses that the calculator does not know, and as
    search_structures does.
    """
    elements = elements_of(spec.composition)
    system = replace(crystal_system(elements), name=spec.composition)
    if spec.calculator.name == "pyscf":
        raise UserError(f"search {spec.composition}: calculator 'pyscf' has no stress here; choose emt or tblite")
    if spec.calculator.name == "emt":
        require_emt_elements(spec.composition, elements)
    least, most = spec.volume_per_atom
    search = Search(
        candidates=spec.candidates,
        smallest_volume=least,
        largest_volume=most,
        shortest_distance=spec.shortest_distance,
        seed=spec.seed,
        relaxation=Relaxation(pressure=spec.pressure_gpa * EV_PER_ANGSTROM3_PER_GPA),
        workers=spec.workers or len(os.sched_getaffinity(0)),
    )
    method = method_of(spec.calculator, system).name
    return search_structures(elements.tolist(), partial(calculator_named, spec.calculator), method, out, search)


def elements_of(composition: str) -> np.ndarray:
    """Atomic numbers [N], sorted, of a formula as in Cu3Al; raises UserError naming what is no element."""
    from ase.data import atomic_numbers

    parts = _PART.findall(composition)
    unknown = [symbol for symbol, _ in parts if symbol not in atomic_numbers]
    if not parts or unknown or "".join(symbol + count for symbol, count in parts) != composition:
        wrong = f": no element {unknown[0]!r}" if unknown else ""
        raise UserError(f"composition {composition!r}{wrong}; expected elements and their numbers, as in Cu4 or Cu3Al")
    counts = [(atomic_numbers[symbol], int(count or 1)) for symbol, count in parts]
    elements = np.sort(np.concatenate([np.full(count, number, np.int64) for number, count in counts]))
    if not len(elements):
        raise UserError(f"composition {composition!r}: holds no atom")
    return elements
