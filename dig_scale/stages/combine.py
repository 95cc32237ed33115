"""Several ensembles of one system and one model, steered or not, become one: `dig-scale combine`.

In: folders of ensembles as `dig-scale sample` wrote them, umbrella windows among them. Out: the folder of one Ensemble with
log_weights towards the model's own distribution (MODEL), and in words whether the windows hold together. Every bias is
evaluated anew on every sample; where a window's own comes out as another than the one it was steered by, all is refused.
A stage of the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.ensemble import FILE_NAME, MODEL, WINDOWS, Ensemble
from dig_scale.errors import UserError
from dig_scale.progress import stage
from dig_scale.run_record import RECORD, claim
from dig_scale.stages.combine_windows import Part, biases_of, parts_of, same_noise, window_of

if TYPE_CHECKING:
    from dig_scale.sampling.umbrella import Combined, Window


@dataclass(frozen=True)
class Found:
    """The ensemble as it was written, and in words what its windows say, line by line."""

    ensemble: Ensemble
    words: tuple[str, ...]


def combine_stage(sources: Sequence[Path], out: Path) -> Found:
    """Write the ensemble of all samples into `out`; raises UserError naming a folder that does not belong to the others."""
    from dig_scale.outputs.ensembles import write_ensemble_folder
    from dig_scale.sampling.umbrella import combined

    with stage("combine") as report:
        parts = parts_of(sources)
        _claim(out, parts)
        report(0, 2, f"biases of {len(parts)} windows")
        biases, windows = biases_of(parts), [window_of(part) for part in parts]
        report(1, 2, "free energies")
        found = combined(windows, biases)
        ensemble = _joined(parts, windows, found)
        write_ensemble_folder(ensemble, out)
        report(2, 2, f"{ensemble.n_samples} samples")
    return Found(ensemble, tuple(_in_words(parts, windows, found)))


def _claim(out: Path, parts: Sequence[Part]) -> None:
    """Make `out` the folder of these windows in this order; raises UserError where it holds anything else."""
    told = parts[0].ensemble.provenance
    identity = {
        "combined": [part.digest for part in parts],
        "checkpoint": told["checkpoint"],
        "system_id": parts[0].ensemble.system.system_id,
    }
    if (out / FILE_NAME).is_file() and not (out / RECORD).is_file():
        raise UserError(f"{out} holds samples that were not combined: give another --out")
    claim(out, identity)


def _joined(parts: Sequence[Part], windows: Sequence[Window], found: Combined) -> Ensemble:
    """All samples, numbered anew; the provenance says which rows came from where."""
    ensembles = [part.ensemble for part in parts]
    known = [name for name in ("rotations", "cell") if getattr(ensembles[0], name) is not None]
    arrays = {name: np.concatenate([getattr(one, name) for one in ensembles]) for name in ("positions", *known)}
    return Ensemble(
        system=ensembles[0].system,
        index=np.arange(len(found.log_weights)),
        seed=ensembles[0].seed,
        log_weights=found.log_weights,
        replicates=found.replicates,
        provenance=_provenance(parts, windows, found),
        **arrays,
    )


def _provenance(parts: Sequence[Part], windows: Sequence[Window], found: Combined) -> dict[str, Any]:
    told = [part.ensemble.provenance for part in parts]
    samples = np.array([part.ensemble.n_samples for part in parts])
    shared = ("checkpoint", "system_id", "conditions", "guidance", "guide", "recipe", "training_cost")
    evaluations = np.array([one.get("network_evaluations_per_sample", np.nan) for one in told], np.float64)
    stops = np.cumsum(samples)
    rows = [
        _told_of(part, window, (int(stop - count), int(stop)))
        | {"free_energy_kT": _number(free), "free_energy_error_kT": _number(error)}
        for part, window, stop, count, free, error in zip(
            parts, windows, stops, samples, found.free_energies, found.errors, strict=True
        )
    ]
    return {name: told[0][name] for name in shared if name in told[0]} | {
        "solver": ", ".join(dict.fromkeys(str(one["solver"]) for one in told)),
        "network_evaluations_per_sample": _number((evaluations * samples).sum() / samples.sum()),
        "cpu_seconds": float(sum(one.get("cpu_seconds", 0.0) for one in told)),
        "log_weights": MODEL,
        WINDOWS: rows,
        "overlap": found.overlap.tolist(),
        "errors": "asymptotic" if found.replicates is None else "populations",
    }


def _told_of(part: Part, window: Window, rows: tuple[int, int]) -> dict[str, Any]:
    """What a window was, and which rows [start, stop) of the whole are its samples."""
    kept = ("solver", "steps", "steer", "population", "populations")
    told = {name: part.ensemble.provenance[name] for name in kept if name in part.ensemble.provenance}
    index = part.ensemble.index
    return told | {
        "source": str(part.path),
        "rows": list(rows),
        "seed": part.ensemble.seed,
        "index": [int(index.min()), int(index.max())],
        "effective_samples": window.effective,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _in_words(parts: Sequence[Part], windows: Sequence[Window], found: Combined) -> Iterator[str]:
    from dig_scale.sampling.reweighting import diagnose, verdict

    for number, part in enumerate(parts):
        yield _window_in_words(number, windows, found)
        if part.left_out:
            yield f"{part.name}: {part.left_out} samples are broken and were left out"
    yield _errors_in_words(windows, found)
    yield from _warnings(parts, found)
    yield f"weights: {verdict(diagnose(found.log_weights))}"


def _window_in_words(number: int, windows: Sequence[Window], found: Combined) -> str:
    from dig_scale.sampling.umbrella import neighbours

    window = windows[number]
    count = f"{len(window.log_weights)} samples"
    if window.population is not None:
        count += f" in {window.populations} population{'s' if window.populations > 1 else ''}"
    free = f"free energy {found.free_energies[number]:.2f} {_plus_minus(found.errors[number])} kT"
    if window.population is not None:
        free += f" (by its own weights alone {window.own_free_energy:.2f})"
    near = [link for link in neighbours(found.overlap) if number in (link.first, link.second)]
    with_others = [f"{link.overlap:.3f} with {windows[link.first + link.second - number].name}" for link in near]
    overlap = f"; overlap {', '.join(with_others)}" if near else ""
    return f"{window.name}: {count}, ESS {window.effective:.1f}, {free}{overlap}"


def _plus_minus(error: float) -> str:
    return f"± {error:.2f}" if np.isfinite(error) else "(error not known)"


def _errors_in_words(windows: Sequence[Window], found: Combined) -> str:
    from dig_scale.sampling.umbrella import REPLICATES

    if found.replicates is not None:
        return f"errors: bootstrap over independent populations and unsteered samples, {REPLICATES} replicates"
    alone = [window.name for window in windows if window.population is not None and window.populations == 1]
    counted = "is one population" if len(alone) == 1 else "are one population each"
    return (
        f"errors: asymptotic, with each window's effective samples for its number of samples; {', '.join(alone)} {counted}, "
        "whose samples are not independent, so errors, those of reweighted numbers too, may be too small: draw several "
        "populations (--num a multiple of --batch)"
    )


def _warnings(parts: Sequence[Part], found: Combined) -> Iterator[str]:
    from dig_scale.sampling.umbrella import LEAST_OVERLAP, neighbours

    for link in neighbours(found.overlap):
        if link.overlap < LEAST_OVERLAP:
            first, second = parts[link.first].name, parts[link.second].name
            yield (
                f"warning: {first} and {second} do not overlap ({link.overlap:.3f}, below {LEAST_OVERLAP:g}), and nothing "
                "connects them better: populations across that gap cannot be trusted; add a window between them"
            )
    for names in same_noise(parts):
        yield (
            f"warning: {', '.join(names)} were drawn from the same noise, so their samples are not independent: give each "
            "window its own --seed"
        )
    ways = {(one.ensemble.provenance["solver"], one.ensemble.provenance.get("steps")) for one in parts}
    if len(ways) > 1:
        listed = ", ".join(f"{solver} with {steps} steps" for solver, steps in sorted(ways, key=str))
        yield f"warning: solvers or steps differ ({listed}): what they sample is the same only as far as the steps suffice"
