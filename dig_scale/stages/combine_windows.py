"""Ensembles as windows of one distribution: which belong together, and the bias of every sample in each of them.

In: folders that `dig-scale sample` wrote. Out: Parts, and what sampling.umbrella takes of them. Raises UserError naming the
folder that does not fit the first one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.ensemble import FILE_NAME, STEERED, STRATA, WINDOWS, Ensemble, read_ensemble
from dig_scale.errors import UserError

if TYPE_CHECKING:
    from dig_scale.sampling.umbrella import Window

_AT_ONCE = 512
"""Structures of which a potential is evaluated together."""
_SAME, _SAME_FRACTION = 1e-2, 1e-3
"""By how much a bias may come out differently on another device: nat, and a fraction of it."""
_FEW = 0.01
"""Share of the samples for which it may differ by more, as where a potential jumps."""


@dataclass(frozen=True)
class Part:
    """One ensemble without its broken samples, of which there were left_out, with its name, folder and file's hash."""

    name: str
    path: Path
    digest: str
    ensemble: Ensemble
    left_out: int

    @property
    def steer(self) -> dict[str, Any] | None:
        """What it was steered by; None where it was not."""
        found: dict[str, Any] | None = self.ensemble.provenance.get("steer")
        return found


def parts_of(sources: Sequence[Path]) -> list[Part]:
    """The ensembles of these folders or files; raises UserError where they are not windows of one distribution."""
    if not sources:
        raise UserError("no ensembles to combine: give the folders that `dig-scale sample` wrote")
    parts = [_part(path, name) for path, name in zip(sources, _names(sources), strict=True)]
    for part in parts:
        _require_as_sampled(part)
        _require_like(part, parts[0])
    for first, second in combinations(parts, 2):
        if _noise_in_common(first, second) and _drawn_by(first) == _drawn_by(second):
            raise UserError(
                f"{second.path} holds samples of {first.path} (same seed, numbers and potentials): give each once"
            )
    return parts


def window_of(part: Part) -> Window:
    """The weights of an ensemble, and which of its populations each sample belongs to."""
    from dig_scale.sampling.umbrella import Window

    ensemble, seed = part.ensemble, part.ensemble.seed % 2**63
    if part.steer is None:
        return Window(part.name, np.zeros(ensemble.n_samples), stream=(seed, int(ensemble.index.min())))
    assert ensemble.log_weights is not None
    told = ensemble.provenance["populations"]
    firsts = np.sort([one["first"] for one in told])
    which = np.searchsorted(firsts, ensemble.index, side="right") - 1
    present, population = np.unique(which, return_inverse=True)
    distinct = sum(int(one["distinct"]) for one in told)
    stream = (seed, *(int(first) for first in firsts[present]))
    return Window(part.name, np.asarray(ensemble.log_weights, np.float64), population, distinct, stream)


def biases_of(parts: Sequence[Part]) -> np.ndarray:
    """The bias [K, S] nat that every window's potentials give all samples; 0 where a window was not steered.

    Raises UserError where potentials are gone, or give another bias than the one that a window was steered by.
    """
    found = np.zeros((len(parts), sum(part.ensemble.n_samples for part in parts)))
    for row, part in zip(found, parts, strict=True):
        if part.steer is not None:
            row[:] = _bias(part, [one.ensemble for one in parts])
    starts = np.cumsum([0, *(part.ensemble.n_samples for part in parts)])
    for number, part in enumerate(parts):
        _require_same(part, found[number, starts[number] : starts[number + 1]])
    return found


def same_noise(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """Names of the windows that were drawn from the same noise, seed by seed."""
    seeds: dict[int, dict[str, None]] = {}
    for first, second in combinations(parts, 2):
        if _noise_in_common(first, second):
            seeds.setdefault(first.ensemble.seed, {}).update({first.name: None, second.name: None})
    return [tuple(names) for names in seeds.values()]


def _part(path: Path, name: str) -> Part:
    from dig_scale.evaluation.weights import usable

    ensemble = read_ensemble(path)
    file = path / FILE_NAME if path.is_dir() else path
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    rows = usable(ensemble)
    if not rows.any():
        raise UserError(f"{path}: not one of its {len(rows)} samples is whole; sample again")
    return Part(name, path, digest, ensemble.take(rows), int((~rows).sum()))


def _names(sources: Sequence[Path]) -> list[str]:
    """The folders' own names, or whole paths where those are not different."""
    short = [
        path.parent.name if path.name == FILE_NAME else path.stem if path.is_file() else path.name for path in sources
    ]
    return short if len(set(short)) == len(short) and all(short) else [str(path) for path in sources]


def _require_as_sampled(part: Part) -> None:
    told, ensemble = part.ensemble.provenance, part.ensemble
    if "checkpoint" not in told or "solver" not in told or WINDOWS in told or STRATA in told:
        raise UserError(f"{part.path} is not as `dig-scale sample` wrote it: combine samples of a model, all at once")
    if "validity" in told:
        raise UserError(
            f"{part.path} holds samples that were chosen by --valid, which are not the model's distribution: sample without it"
        )
    steered = part.steer is not None and ensemble.bias is not None and "populations" in told
    if ensemble.log_weights_towards != (STEERED if steered else None):
        raise UserError(
            f"{part.path}: its weights are not those that it was sampled with (they are towards: "
            f"{ensemble.log_weights_towards or 'nothing'}); combine ensembles as they were sampled, and ask for densities and "
            "energies of the combined one"
        )


def _require_like(part: Part, first: Part) -> None:
    """Raises UserError where a window is not of the first one's system, model, guide and wanted properties."""
    if part.ensemble.system.system_id != first.ensemble.system.system_id:
        raise UserError(
            f"{part.path} is of another system ({part.ensemble.system.name!r}) than {first.path} "
            f"({first.ensemble.system.name!r}): windows are of one system"
        )
    names = {
        "checkpoint": "checkpoint",
        "guide": "guide",
        "conditions": "conditions",
        "guidance": "weight of conditions",
    }
    for key, name in names.items():
        own, other = part.ensemble.provenance.get(key), first.ensemble.provenance.get(key)
        if own != other:
            raise UserError(f"{part.path} has another {name} ({own}) than {first.path} ({other}): sample it again")


def _noise_in_common(first: Part, second: Part) -> bool:
    shared = np.intersect1d(first.ensemble.index, second.ensemble.index)
    return first.ensemble.seed == second.ensemble.seed and len(shared) > 0


def _drawn_by(part: Part) -> tuple[Any, ...]:
    told = part.ensemble.provenance
    return told.get("steer"), told["solver"], told.get("steps")


def _bias(part: Part, ensembles: Sequence[Ensemble]) -> np.ndarray:
    """The bias [S] of all ensembles' structures by one window's potentials, as steering evaluates it."""
    import torch

    from dig_scale.batch import Geometry
    from dig_scale.config_properties import SteerSpec
    from dig_scale.model.features import featurise
    from dig_scale.sampling.from_settings import steering_from
    from dig_scale.sampling.steering import bias_of

    system = ensembles[0].system
    try:
        potential, settings = steering_from(SteerSpec.model_validate(part.steer), system)
    except (UserError, OSError, SyntaxError, ImportError) as error:
        raise UserError(
            f"{part.path}: its potentials cannot be evaluated again ({error}); files and modules must be where they were "
            "when it was sampled, seen from the folder that the command runs in"
        ) from error
    context, found = featurise(system), []
    for ensemble in ensembles:
        for start in range(0, ensemble.n_samples, _AT_ONCE):
            block = ensemble.take(np.arange(start, min(start + _AT_ONCE, ensemble.n_samples)))
            fields = (block.positions, block.rotations, block.cell)
            tensors = [None if values is None else torch.as_tensor(values, dtype=torch.float32) for values in fields]
            with torch.no_grad():
                found.append(bias_of(Geometry(*tensors), context, potential, settings).numpy())  # type: ignore[arg-type]
    return np.concatenate(found)


def _require_same(part: Part, again: np.ndarray) -> None:
    stored = np.zeros(len(again)) if part.ensemble.bias is None else part.ensemble.bias
    apart = np.abs(again - stored)
    other = apart > _SAME + _SAME_FRACTION * np.abs(stored)
    if other.mean() > _FEW:
        worst = int(apart.argmax())
        raise UserError(
            f"{part.path}: its potentials now give another bias than the one it was steered by ({int(other.sum())} of "
            f"{len(other)} samples; one has {again[worst]:.4g} for {stored[worst]:.4g} nat): a file or module of a potential "
            "was changed since; put it back as it was, or sample the window again"
        )
