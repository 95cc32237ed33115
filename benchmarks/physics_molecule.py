"""Alanine dipeptide with all 22 atoms by the `full` recipe: densities, weights, guidance, a path, cost; and the `pidp` ablation.

What the recipe trained is read from the folder of finished runs, where `benchmarks/walk.py` leaves it too; everything else is
made by the commands that a user would type.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.rows import Row, at_least, at_most, note
from benchmarks.walk import dig_scale, timed
from dig_scale.ensemble import STRATA, Ensemble, read_ensemble
from dig_scale.evaluation.validity import BOND, STEREO, Validity, validity
from dig_scale.geometry.alignment import aligned_rmsd
from dig_scale.records import evenly_spread
from dig_scale.sampling.likelihood import Exact, LikelihoodSettings, log_density

PHI, PSI = "dihedral:4,6,8,10", "dihedral:6,8,10,16"
LEFT, RIGHT = f"left:{PHI}:-180:0", f"right:{PHI}:0:180"
HELD_OUT, DRAWN, WEIGHED, OF_EACH_STATE = 2_000, 12_000, 250, 300
WINDOW = (120.0, 180.0)
"""Degrees of psi that guided samples are asked for."""
C7_EQUATORIAL, C7_AXIAL = (-80.0, 75.0), (70.0, -60.0)
"""phi and psi in degrees."""
COSTED, ALONE = 64, 16
STEPS = 40


def density_rows(runs: Path) -> list[Row]:
    """log p of held-out frames against the energy; weights of the model's samples and what they do to a free energy."""
    model = _model(runs)
    held_out, drawn = model.parent / "density-held-out", model.parent / "density-samples"
    common = ("--model", model, "--energy", "--divergence", "exact")
    dig_scale("density", model.parent / "dataset", *common, "--num", HELD_OUT, "--out", held_out)
    samples = model.parent / "ode"
    dig_scale("sample", model, "--solver", "heun", "--steps", STEPS, "--num", DRAWN, "--out", samples)
    dig_scale("density", samples, *common, "--num", WEIGHED, "--out", drawn)
    states = model.parent / "density-states"
    dig_scale("density", samples, *common, "--num", OF_EACH_STATE, "--state", LEFT, "--state", RIGHT, "--out", states)
    counts = {one["state"]: one["samples"] for one in read_ensemble(states).provenance[STRATA]}
    drawn_difference = float(np.log(counts["left"] / counts["right"]))
    rows = _difference_rows(_physics(states, model), drawn_difference)
    return [*_agreement_rows(held_out), *_weight_rows(_physics(drawn, model)), *rows]


def _physics(ensemble: Path, model: Path) -> dict[str, Any]:
    """What the report of an ensemble says of weights and of the two states."""
    dig_scale("reweight", ensemble, "--state", LEFT, "--state", RIGHT)
    report = ensemble.with_name(f"{ensemble.name}-report")
    dig_scale("evaluate", ensemble, "--reference", model.parent / "trajectories", "--out", report)
    found: dict[str, Any] = json.loads((report / "report.json").read_text())["physics"]
    return found


def _agreement_rows(held_out: Path) -> list[Row]:
    from dig_scale.evaluation.weights import agreement

    found = agreement(read_ensemble(held_out))
    assert found is not None
    return [
        at_least(f"ala2: log p against -u of {found.samples} held-out frames, Pearson r", found.pearson, "", 0.8),
        note("ala2: held-out frames, standard deviation of -u - log p", found.standard_deviation, "nat"),
    ]


def _weight_rows(physics: dict[str, Any]) -> list[Row]:
    weights = physics["weights"]
    return [
        at_least(f"ala2: ESS of {weights['samples']} raw samples", 100 * weights["fraction"], "%", 5),
        note("ala2: Pareto k", weights["pareto_k"]),
        note("ala2: log Z", weights["log_z"]["value"], "nat"),
    ]


def _difference_rows(by_state: dict[str, Any], sampled: float) -> list[Row]:
    """Free energies of phi; reweighted from samples that were chosen by state, since plain ones hold few of the rarer."""
    difference, weights = by_state["states"]["differences"][0], by_state["weights"]
    md, reweighted = difference["md"], difference["reweighted"]
    return [
        note("ala2: free energy of phi >= 0 over phi < 0, replica-exchange MD", md["value"], "kT"),
        note("ala2: its error", md["error"], "kT"),
        note(f"ala2: the same of {DRAWN} samples as drawn", sampled, "kT"),
        note(f"ala2: the same reweighted, {OF_EACH_STATE} samples of each state at most", reweighted["value"], "kT"),
        note("ala2: error of the reweighted one", reweighted["error"], "kT"),
        note(f"ala2: ESS of the {weights['samples']} samples by state", 100 * weights["fraction"], "%"),
        note("ala2: as drawn, off MD by", abs(sampled - md["value"]), "kT"),
        at_most("ala2: reweighted, off MD by", abs(reweighted["value"] - md["value"]), "kT", 0.25),
    ]


def molecule_guidance_rows(runs: Path) -> list[Row]:
    """Samples asked for a window of psi, judged by the window, and by geometry that no guide saw."""
    model = _model(runs)
    guided, free = model.parent / "guided", model.parent / "unguided"
    low, high = WINDOW
    dig_scale("sample", model, "--guide", PSI, "--guide-window", low, high, "--num", 1_000, "--out", guided)
    dig_scale("sample", model, "--num", 1_000, "--out", free)
    ensembles = {"guided": read_ensemble(guided), "unguided": read_ensemble(free)}
    inside = {name: 100 * float(_in_window(one).mean()) for name, one in ensembles.items()}
    sound = {name: validity(one) for name, one in ensembles.items()}
    rows = [
        note(f"ala2: unguided samples with psi in {low:g} to {high:g}", inside["unguided"], "%"),
        at_least(f"ala2: guided samples with psi in {low:g} to {high:g}", inside["guided"], "%", 80),
    ]
    for reason, words in ((STEREO, "of right chirality"), (BOND, "with whole bonds")):
        share = {name: 100 * (1 - _failing(one, reason)) for name, one in sound.items()}
        rows.append(note(f"ala2: unguided samples {words}", share["unguided"], "%"))
        rows.append(note(f"ala2: guided samples {words}", share["guided"], "%"))
        lost = share["unguided"] - share["guided"]
        rows.append(at_most(f"ala2: points of samples {words} lost by guidance", lost, "%", 2))
    return rows


def _in_window(ensemble: Ensemble) -> np.ndarray:
    from dig_scale.evaluation.states import state_masks
    from dig_scale.sampling.from_settings import states_from

    name = "window"
    return np.asarray(state_masks(states_from([f"{name}:{PSI}:{WINDOW[0]}:{WINDOW[1]}"]), ensemble)[name])


def _failing(found: Validity, reason: str) -> float:
    return float(found.failed[reason].mean()) if reason in found.failed else 0.0


def path_rows(runs: Path) -> list[Row]:
    """From C7eq to C7ax, both of them frames of the MD that the model was not shown."""
    from dig_scale.outputs.molecules import write_pdb

    model = _model(runs)
    out = model.parent / "path"
    out.mkdir(exist_ok=True)
    frames = _held_out_frames(model)
    ends = [out / "c7eq.pdb", out / "c7ax.pdb"]
    for path, place in zip(ends, (C7_EQUATORIAL, C7_AXIAL), strict=True):
        write_pdb(path, frames.system, frames.positions[_nearest(frames, place)])
    dig_scale("interpolate", *ends, "--model", model, "--frames", 41, "--out", out / "frames")
    found = read_ensemble(out / "frames")
    ends_off = [
        float(aligned_rmsd(found.positions[frame], frames.positions[_nearest(frames, place)]))
        for frame, place in ((0, C7_EQUATORIAL), (-1, C7_AXIAL))
    ]
    broken = _failing(validity(found), BOND) * found.n_samples
    return [
        at_most("ala2: C7eq to C7ax, larger RMSD of an end to its input", max(ends_off), "Å", 0.1),
        note("ala2: C7eq to C7ax, frames", float(found.n_samples)),
        at_most("ala2: C7eq to C7ax, frames with a broken bond", broken, "", 0),
    ]


def _held_out_frames(model: Path) -> Ensemble:
    """Held-out frames of the dataset as an ensemble."""
    import torch

    from dig_scale.serving.served import load_served_model
    from dig_scale.stages.density_sources import Source, structures_of

    return structures_of(Source(model.parent / "dataset"), model, load_served_model(model, torch.device("cpu")))


def _nearest(frames: Ensemble, place: tuple[float, float]) -> int:
    """The frame whose phi and psi are nearest to a place, in degrees."""
    off = [_around(_torsion(frames, prop) - at) for prop, at in zip((PHI, PSI), place, strict=True)]
    return int(np.argmin(np.hypot(*off)))


def _torsion(frames: Ensemble, prop: str) -> np.ndarray:
    """Degrees, by a library that guides nothing."""
    import mdtraj

    sites = [int(site) for site in prop.partition(":")[2].split(",")]
    trajectory = mdtraj.Trajectory(frames.positions / 10, None)
    return np.degrees(mdtraj.compute_dihedrals(trajectory, [sites])[:, 0])


def _around(degrees: np.ndarray) -> np.ndarray:
    return (degrees + 180) % 360 - 180


def cost_rows(runs: Path) -> list[Row]:
    """Seconds and network calls of exact log-densities: nothing, directions, and frames batched, and batches on all cores.

    What is not batched takes long, so it is measured on frames that are evenly spread over those of the batch. Unless
    OMP_NUM_THREADS says otherwise, each has all cores: for the operations of one process, or with a process on each, as in
    `dig-scale density`.
    """
    from dig_scale.serving.processes import process_count

    model, processes = _model(runs), process_count(None)
    frames = _held_out_frames(model)
    frames = frames.take(evenly_spread(frames.n_samples, COSTED * processes))
    batch = frames.take(np.arange(0, frames.n_samples, processes))
    some = batch.take(np.arange(0, COSTED, COSTED // ALONE))
    alone = _cost(model, some, 1, Exact(chunk=1))
    directions = _cost(model, some, 1, Exact())
    batched = _cost(model, batch, COSTED, Exact())
    everywhere = _seconds_by_processes(model, frames)
    what = "ala2: exact log-density"
    return [
        note(f"{what}, a frame and a direction at a time", alone.seconds, "s/frame"),
        note(f"{what}, a frame at a time, all directions of the trace at once", directions.seconds, "s/frame"),
        note(f"{what}, {COSTED} frames at a time", batched.seconds, "s/frame"),
        note(f"{what}, {COSTED} frames at a time in each of {processes} processes", everywhere, "s/frame"),
        note("ala2: calls of the network for a frame alone", alone.calls),
        at_least("ala2: batched over one at a time, in one process", alone.seconds / batched.seconds, "x", 5),
        at_least("ala2: batched over one at a time, as the command does it", alone.seconds / everywhere, "x", 5),
        note("ala2: frames batched over directions batched", directions.seconds / batched.seconds, "x"),
    ]


def _seconds_by_processes(model: Path, frames: Ensemble) -> float:
    """Per frame, by `dig-scale density`'s own batches and processes, whose start is among them."""
    import torch

    from dig_scale.serving.densities import DensityRun, Structures, log_densities
    from dig_scale.serving.served import load_served_model

    served = load_served_model(model, torch.device("cpu"))
    structures = Structures(frames.system, frames.positions)
    run = DensityRun(model, served.checkpoint_id, structures, LikelihoodSettings(), batch=COSTED)
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        log_densities(run, Path(folder))
        return (time.perf_counter() - begin) / frames.n_samples


@dataclass(frozen=True)
class Cost:
    """Wall seconds and network calls per frame."""

    seconds: float
    calls: float


def _cost(model: Path, frames: Ensemble, batch: int, divergence: Exact) -> Cost:
    import torch

    from dig_scale.serving.served import best_device, build_bench, load_served_model

    bench = build_bench(load_served_model(model, best_device()), frames.system)
    places = torch.as_tensor(frames.positions, device=bench.context.present.device)
    settings, calls = LikelihoodSettings(divergence=divergence), 0
    begin = time.perf_counter()
    for first in range(0, len(places), batch):
        state = bench.composition.state({"positions": places[first : first + batch]}, bench.context)
        calls += log_density(bench.score_fn, bench.composition, state, bench.context, settings).evaluations
    return Cost((time.perf_counter() - begin) / len(places), calls / len(places))


def ablation_rows(runs: Path) -> list[Row]:
    """200 frames, their energy, and both, at equal training time."""
    out = runs / "pidp"
    minutes = timed(runs / "pidp.json", lambda: dig_scale("ablate", "pidp", "--out", out))
    table = json.loads((out / "ablation.json").read_text())
    rows = [note("PIDP on alanine dipeptide: simulation and three trainings", minutes, "min")]
    for one in table["rows"]:
        about = f"PIDP on alanine dipeptide, {one['training']}"
        rows.append(note(f"{about}: steps", one["steps"], "steps"))
        rows.append(note(f"{about}: JS(phi, psi)", one["divergence"], "nat"))
        rows.append(note(f"{about}: standard error of that", one["divergence_error"], "nat"))
    return [*rows, at_least("PIDP on alanine dipeptide: JS lowered by the energy", 100 * table["gain"], "%", 30)]


def _model(runs: Path) -> Path:
    """The model of the full recipe, trained where it is not there."""
    out = runs / "full"
    timed(runs / "full.json", lambda: dig_scale("run", "full", "--out", out))
    return out / "model"
