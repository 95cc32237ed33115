"""Some samples of every state, weighted by how many each stands for, so that a rare state gets as many as a common one.

In: an Ensemble of plain samples, and States. Out: an Ensemble of fewer samples whose log_weights lead back to the model's own
distribution (stratified sampling; Cochran 1977, Sampling Techniques, chapter 5). Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dig_scale.ensemble import MODEL, STRATA, Ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.states import state_masks
from dig_scale.records import evenly_spread
from dig_scale.sampling.from_settings import State

ELSEWHERE = "in no state"


def stratified(ensemble: Ensemble, states: Sequence[State], num: int) -> Ensemble:
    """At most `num` samples of each state, and of what lies in none, evenly spread, with log-weights of mean weight 1.

    Raises UserError for samples that have weights or were not drawn by a model, and for states that overlap.
    """
    if "solver" not in ensemble.provenance or ensemble.log_weights is not None or ensemble.is_tilted:
        raise UserError(
            f"--state chooses among the samples of a model as it draws them; the structures of {ensemble.system.name!r} are "
            "from elsewhere, or have weights"
        )
    members = {name: np.flatnonzero(mask) for name, mask in _disjoint(states, ensemble).items()}
    chosen = {name: one[evenly_spread(len(one), num)] for name, one in members.items() if len(one)}
    rows = np.concatenate(list(chosen.values()))
    stands_for = np.concatenate([np.full(len(one), len(members[name]) / len(one)) for name, one in chosen.items()])
    order = np.argsort(rows)
    told = [{"state": name, "samples": len(one), "chosen": len(chosen.get(name, []))} for name, one in members.items()]
    provenance: dict[str, Any] = ensemble.provenance | {STRATA: told, "log_weights": MODEL}
    log_weights = np.log(stands_for / stands_for.mean())
    return replace(ensemble.take(rows[order]), log_weights=log_weights[order], provenance=provenance)


def _disjoint(states: Sequence[State], ensemble: Ensemble) -> dict[str, np.ndarray]:
    """Samples [S] of each state, and of none."""
    masks = dict(state_masks(states, ensemble))
    count = np.sum(list(masks.values()), axis=0)
    if (count > 1).any():
        shared = [name for name, mask in masks.items() if (mask & (count > 1)).any()]
        raise UserError(
            f"states {', '.join(shared)} share {int((count > 1).sum())} samples: give states that do not overlap"
        )
    return masks | {ELSEWHERE: count == 0}
