"""From the words of a request to a System: a training system's name, a sequence, a SMILES, or a System in JSON.

In: SamplesRequest. Out: System, or RequestError with the HTTP status and the field at fault. Sequences and SMILES are
built as for training: the recipe's force field, hydrogens dropped where the recipe packs heavy atoms only, residues where
the model's sites are residues.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.records import packed_system
from dig_scale.serving.schema import MAX_SITES, SamplesRequest
from dig_scale.serving.served import ServedModel
from dig_scale.system import System

LOGGER = logging.getLogger(__name__)
_BOND_ORDERS = {0, 1, 2, 3, 4}
_LOWEST_CELL = 1.0
"""Å; the number of images within the cutoff grows as cells get flatter."""


class RequestError(UserError):
    """A request that cannot be served: HTTP `status` and the `field` of the body that is wrong."""

    def __init__(self, status: int, field: str, problem: str) -> None:
        super().__init__(problem)
        self.status = status
        self.field = field


class Catalogue:
    """Systems by request for one model. Building is serialised and remembered; safe to use from several threads."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._built = lru_cache(maxsize=64)(self._build)

    def system(self, request: SamplesRequest) -> System:
        """The request's system; raises RequestError."""
        given = request.system
        if isinstance(given, str):
            return self._named(given)
        if given is not None:
            return _checked("system", lambda: _inline(given))
        field = "sequence" if request.sequence is not None else "smiles"
        text = request.sequence if request.sequence is not None else request.smiles
        with self._lock:
            return _checked(field, lambda: self._built(field, text))

    def _named(self, name: str) -> System:
        system = self._model.systems.get(name)
        if system is None:
            known = ", ".join(sorted(self._model.systems)) or "none"
            raise RequestError(404, "system", f"no training system is named {name!r}; this checkpoint has: {known}")
        return system

    def _build(self, field: str, text: str) -> System:
        system = _from_sequence(text, self._model) if field == "sequence" else _from_smiles(text)
        return packed_system(system, self._model.recipe.pack)


def _from_sequence(text: str, model: ServedModel) -> System:
    if model.recipe.model.sites == "residues":
        from dig_scale.importers.backbone import residue_chain
        from dig_scale.importers.sequence import parse_sequence

        return residue_chain(text, parse_sequence(text), {"source": "sequence"})
    from dig_scale.importers.protein import system_from_sequence

    return system_from_sequence(text, text, model.recipe.simulate)


def _from_smiles(text: str) -> System:
    from dig_scale.importers.molecule import system_from_smiles

    return system_from_smiles(text, text)


def _inline(content: dict[str, Any]) -> System:
    system = System.from_dict(content)
    wrong = sorted(set(system.bond_orders.tolist()) - _BOND_ORDERS)
    if wrong:
        raise UserError(f"system {system.name!r}, bond_orders: found {wrong}, expected 0 (unknown) to 4 (aromatic)")
    if system.cell is not None:
        heights = 1 / np.linalg.norm(np.linalg.inv(system.cell), axis=0)
        if heights.min() < _LOWEST_CELL:
            raise UserError(
                f"system {system.name!r}, cell: its faces are {heights.min():.3g} Å apart, expected at least {_LOWEST_CELL:g}"
            )
    return system


def _checked(field: str, build: Callable[[], System]) -> System:
    try:
        system = build()
    except UserError as error:
        raise RequestError(422, field, str(error)) from error
    except (
        Exception
    ) as error:  # malformed JSON content, or a chemistry library's own complaint: the request is at fault
        LOGGER.exception("no system could be made of the %s of a request", field)
        raise RequestError(422, field, f"no system could be made of it: {type(error).__name__}: {error}") from error
    if system.n_sites > MAX_SITES:
        raise RequestError(413, field, f"{system.n_sites} sites; this server takes systems of up to {MAX_SITES}")
    return system
