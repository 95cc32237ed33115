"""What the weights of an ensemble say: `dig-scale reweight`.

In: an ensemble with weights, and states. Out: reweighting.json beside it, and the same in words, where no reweighted number
stands without the effective sample size that it rests on. `evaluate` shows the same states in its report. A stage of the
command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dig_shards.durable import replace_durably

from dig_scale.ensemble import read_ensemble

if TYPE_CHECKING:
    from dig_scale.evaluation.sets import Estimate
    from dig_scale.evaluation.states import Reweighted, StateTable
    from dig_scale.evaluation.weights import Weights

FILE_NAME = "reweighting.json"


def reweight_stage(source: Path, states: Sequence[str], out: Path | None = None) -> list[str]:
    """Write the numbers and give them in words, line by line; raises UserError where there are no weights."""
    from dig_scale.evaluation.result import numbers
    from dig_scale.evaluation.states import state_table
    from dig_scale.evaluation.weights import agreement, agreement_in_words, diagnosed
    from dig_scale.sampling.from_settings import states_from

    ensemble, wanted = read_ensemble(source), states_from(states)
    weights, related = diagnosed(ensemble), agreement(ensemble)
    table = state_table(wanted, ensemble)
    content: dict[str, Any] = {"system": ensemble.system.name, "asked": list(states)}
    content |= {"weights": numbers(weights), "states": numbers(table)}
    content["agreement"] = None if related is None else numbers(related)
    path = out or _beside(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())
    words = [weights.in_words()] if related is None else [weights.in_words(), agreement_in_words(ensemble)]
    return [*words, *_totals_in_words(weights), *_table_in_words(table), f"numbers: {path}"]


def told_states(source: Path) -> tuple[str, ...]:
    """The states that were last asked for of this ensemble; none where it was not reweighted."""
    path = _beside(source)
    return tuple(json.loads(path.read_text())["asked"]) if path.is_file() else ()


def _beside(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / FILE_NAME


def _totals_in_words(weights: Weights) -> Iterator[str]:
    ess = f"ESS {100 * weights.fraction:.1f} %"
    if weights.samples_left_out:
        yield f"{weights.samples_left_out} samples have no weight and were left out"
    if weights.log_z is not None:
        yield f"log Z: {_value(weights.log_z)} nat, {ess}"
    if weights.entropy is not None:
        yield f"entropy: {_value(weights.entropy)} k_B, {ess}"
    if weights.sampled_entropy is not None:
        yield f"entropy of the model: {_value(weights.sampled_entropy)} k_B"


def _table_in_words(table: StateTable) -> Iterator[str]:
    for row in table.states:
        share = f"{row.name} ({row.definition}): {row.samples} samples, population {_value(row.population, 4)}"
        yield share + _reweighted(row.reweighted, 4)
    for one in table.differences:
        yield f"F({one.second}) - F({one.first}): {_value(one.sampled)} kT" + _reweighted(one.reweighted, 2, " kT")


def _reweighted(found: Reweighted | None, digits: int, unit: str = "") -> str:
    if found is None:
        return ""
    return f"; reweighted {_value(found, digits)}{unit}, ESS {100 * found.fraction:.1f} %"


def _value(found: Estimate | Reweighted, digits: int = 2) -> str:
    if found.value is None:
        return "not known (a state is empty)"
    return f"{found.value:.{digits}f}" + ("" if found.error is None else f" ± {found.error:.{digits}f}")
