"""N valid samples or an honest answer: draw, look at what is physically sound, draw more until there are N or a cap is met.

In: Draws whose `num` is the number of VALID samples wanted. Out: ensembles of valid samples, in OUT; all that was drawn is
kept in OUT/attempts, where a run carries on. New indices go on after the old ones, and the first N valid ones in the
order of their indices are taken, so the result depends on model, settings and seed alone. A stage of the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dig_shards.durable import replace_durably

from dig_scale.ensemble import FILE_NAME, Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.progress import Reporter, stage
from dig_scale.run_record import RECORD

if TYPE_CHECKING:
    from dig_scale.evaluation.validity import Validity
    from dig_scale.serving.offline import Draws

ATTEMPTS = "attempts"
ATTEMPTS_PER_SAMPLE = 10
"""Samples drawn at most for each that is wanted, where no cap is given."""
_MARGIN = 2.0
"""Standard deviations of the number of valid samples to come, drawn on top of what is missing, to have fewer rounds."""
_FILTERS = "physical"


@dataclass(frozen=True)
class Accepted:
    """Valid samples, at most as many as were wanted (None: not one), in which folder, and what became of all attempts."""

    ensemble: Ensemble | None
    attempts: Validity
    wanted: int
    out: Path

    @property
    def n_samples(self) -> int:
        """Valid samples that were kept."""
        return 0 if self.ensemble is None else self.ensemble.n_samples

    def in_words(self) -> str:
        """One line: samples there are, attempts, acceptance and reasons."""
        short = "" if self.n_samples == self.wanted else f" ({self.wanted} were wanted)"
        return f"{self.n_samples} valid samples{short}; of all drawn, {self.attempts.in_words()}"


def valid_samples(wanted: Sequence[Draws], cap: int | None = None) -> list[Accepted]:
    """Valid samples of every system, settings.num of each; `cap` bounds all attempts together (ATTEMPTS_PER_SAMPLE each).

    Fewer where the cap is met; raises UserError where a folder holds samples of another run, and where not one is valid at all.
    """
    for draws in wanted:
        _require_filtered(draws.out)
    caps = _caps([draws.settings.num for draws in wanted], cap)
    with stage("sample") as report:
        return _accepted(wanted, caps, report)


def attempts_needed(valid: int, drawn: int, wanted: int, cap: int) -> int:
    """Samples to have drawn in all, next: by the acceptance rate so far, at most `cap`."""
    if valid >= wanted:
        return drawn
    if drawn == 0:
        return min(wanted, cap)
    # half a success more than there were: a rate of nought would ask for all at once
    rate = (valid + 0.5) / (drawn + 1)
    missing = wanted - valid
    return min(cap, drawn + math.ceil((missing + _MARGIN * math.sqrt(missing)) / rate))


def _accepted(wanted: Sequence[Draws], caps: Sequence[int], report: Reporter) -> list[Accepted]:
    from dig_scale.evaluation.validity import validity

    drawn = [_there(draws) for draws in wanted]
    looked = [None if one is None else validity(one) for one in drawn]
    total = sum(draws.settings.num for draws in wanted)
    while True:
        goals = [
            attempts_needed(_valid(seen), len(seen.valid) if seen else 0, draws.settings.num, cap)
            for seen, draws, cap in zip(looked, wanted, caps, strict=True)
        ]
        counts = [0 if one is None else one.n_samples for one in drawn]
        due = [k for k, goal in enumerate(goals) if goal > counts[k]]
        done = sum(min(_valid(seen), draws.settings.num) for seen, draws in zip(looked, wanted, strict=True))
        report(done, total, f"{done} of {total} valid samples, {sum(counts)} drawn")
        if not due:
            break
        for k, ensemble in zip(due, _draw([wanted[k] for k in due], [goals[k] for k in due]), strict=True):
            drawn[k], looked[k] = ensemble, validity(ensemble)
    rows = zip(wanted, drawn, looked, strict=True)
    found = [_written(draws, one, seen) for draws, one, seen in rows if one is not None and seen is not None]
    if not any(one.n_samples for one in found):
        raise UserError(
            f"{found[0].in_words()}; they are in {found[0].out / ATTEMPTS}: train for longer, take more steps, or raise "
            "--attempts-cap"
        )
    return found


def _draw(wanted: Sequence[Draws], goals: Sequence[int]) -> list[Ensemble]:
    from dig_scale.serving.offline import sample_ensembles

    return sample_ensembles([_attempt(draws, goal) for draws, goal in zip(wanted, goals, strict=True)])


def _attempt(draws: Draws, num: int) -> Draws:
    return replace(draws, settings=draws.settings.model_copy(update={"num": num}), out=draws.out / ATTEMPTS)


def _there(draws: Draws) -> Ensemble | None:
    """What an earlier run drew, once it is known to be of the same settings."""
    if not (draws.out / ATTEMPTS / FILE_NAME).is_file():
        return None
    return _draw([draws], [read_ensemble(draws.out / ATTEMPTS).n_samples])[0]


def _written(draws: Draws, drawn: Ensemble, looked: Validity) -> Accepted:
    from dig_scale.outputs.ensembles import write_ensemble_folder

    kept = np.flatnonzero(looked.valid)[: draws.settings.num]
    if not len(kept):
        return Accepted(None, looked, draws.settings.num, draws.out)
    told: dict[str, Any] = {
        "filters": _FILTERS,
        "wanted": draws.settings.num,
        "attempts": drawn.n_samples,
        "valid": int(looked.valid.sum()),
        "acceptance": looked.acceptance,
        "failed": looked.counts(),
    }
    ensemble = replace(drawn.take(kept), provenance=drawn.provenance | {"validity": told})
    _claim(draws.out)
    write_ensemble_folder(ensemble, draws.out)
    return Accepted(ensemble, looked, draws.settings.num, draws.out)


def _valid(looked: Validity | None) -> int:
    return 0 if looked is None else int(looked.valid.sum())


def _caps(wanted: Sequence[int], cap: int | None) -> list[int]:
    """Attempts at most for each system, in proportion to what is wanted of it."""
    if cap is None:
        return [ATTEMPTS_PER_SAMPLE * num for num in wanted]
    if cap < sum(wanted):
        raise UserError(f"--attempts-cap {cap} is below the {sum(wanted)} valid samples wanted: give at least as many")
    return [cap * num // sum(wanted) for num in wanted]


def _claim(out: Path) -> None:
    """Mark a folder as one of chosen samples, so that `sample` without filters adds none to it."""
    content = json.loads((out / ATTEMPTS / RECORD).read_text()) | {"filters": _FILTERS}
    replace_durably(out / RECORD, json.dumps(content, indent=1).encode())


def _require_filtered(out: Path) -> None:
    record = out / RECORD
    there = record.is_file() or (out / FILE_NAME).is_file()
    if there and not (record.is_file() and json.loads(record.read_text()).get("filters") == _FILTERS):
        raise UserError(f"{out} holds samples that no filter has seen: give another --out")
