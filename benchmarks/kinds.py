"""Four kinds of system, measured from real input files to numbers: proteins, ligands in pockets, surfaces, crystals.

    python benchmarks/kinds.py --json benchmarks/results/kinds-DATE.json [--only adk,carbon] [--runs runs]

Finished runs in --runs are read, not repeated (their times were recorded when they ran). Data are read from
DIG_SCALE_SHARED (default ../shared); rows say "not measured" where they are absent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from dig_shards.manifest import TRAIN, VALIDATION

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.kinds_checks import bad_input_rows, code_rows, frame_rows, published_rows, rotation_rows
from benchmarks.rows import NOT_MEASURED, Row, at_least, at_most, note, run_parts
from benchmarks.walk import dig_scale, timed
from dig_scale.ensemble import read_ensemble

SHARED = Path(os.environ.get("DIG_SCALE_SHARED", "../shared")).resolve() / "data"
LONGEST_RECIPE = 30
TARGETS = ("cdk2", "cdk8", "cmet", "eg5", "hif2a", "mcl1", "pfkfb3", "ptp1b", "syk", "thrombin")
POSES = 50


Part = Callable[[Path], list[Row]]


def with_data(name: str, part: Part) -> Part:
    """A part that reads real data, and says so where there are none."""
    missing = [Row(name, f"{NOT_MEASURED}: no data at {SHARED}", "", "", None)]
    return lambda runs: part(runs) if SHARED.is_dir() else missing


def recipe_run(runs: Path, name: str, files: dict[str, Path], *words: str) -> tuple[Path, float]:
    """The folder of a recipe's run with its files in the environment, and the minutes it took."""
    os.environ.update({key: str(path) for key, path in files.items()})
    out = runs / name
    return out, timed(runs / f"{name}.json", lambda: dig_scale("run", name, "--out", out, *words))


def adk_rows(runs: Path) -> list[Row]:
    """Adenylate kinase: both states are visited, chains are whole."""
    from dig_scale.evaluation.proteins import ca_rmsd, soundness
    from dig_scale.importers.backbone import read_backbone

    data = SHARED / "adk_transition"
    files = {
        "ADK_PSF": "adk.psf",
        "ADK_DCD": "adk_dims.dcd",
        "ADK_CLOSED": "adk_closed.pdb",
        "ADK_OPEN": "adk_open.pdb",
    }
    out, minutes = recipe_run(runs, "adenylate-kinase", {key: data / name for key, name in files.items()})
    ensemble = read_ensemble(out / "ensemble")
    states = read_backbone("adk", [data / "adk_closed.pdb", data / "adk_open.pdb"])[1].positions
    close = [float((ca_rmsd(ensemble.positions, state) < 2.0).sum()) for state in states]
    assert ensemble.rotations is not None
    sound = soundness(ensemble.system, ensemble.positions, ensemble.rotations)
    return [
        at_most("adenylate kinase: recipe", minutes, "min", LONGEST_RECIPE),
        note("adenylate kinase: samples", float(ensemble.n_samples)),
        at_least("adenylate kinase: samples within 2 Å of 1AKE", close[0], "", 5),
        at_least("adenylate kinase: samples within 2 Å of 4AKE", close[1], "", 5),
        at_least(
            "adenylate kinase: C-alpha neighbours at 3.8 ± 0.2 Å", 100 * float(sound.ca_steps_near.mean()), "%", 98
        ),
        at_least("adenylate kinase: samples without a clash", 100 * float((sound.ca_clashes == 0).mean()), "%", 90),
    ]


def chignolin_rows(runs: Path) -> list[Row]:
    """Chignolin: pair distances of samples against the trajectory that the model has not seen."""
    from benchmarks.kinds_crystals import split_frames
    from dig_scale.evaluation.proteins import distance_divergence, distant_pairs

    out, minutes = recipe_run(runs, "chignolin", {"CHIGNOLIN_PDB": SHARED / "bioemu_tests" / "chignolin.pdb"})
    ensemble = read_ensemble(out / "ensemble")
    seen, held_out = (split_frames(out, split)[0][1].positions for split in (TRAIN, VALIDATION))
    one, pairs = np.zeros(len(held_out), int), distant_pairs(ensemble.system)
    divergence = distance_divergence(ensemble.positions, held_out, one, pairs).mean
    floor = distance_divergence(seen, held_out, one, pairs).mean
    return [
        at_most("chignolin: recipe", minutes, "min", LONGEST_RECIPE),
        note("chignolin: JS of pair distances, samples against the held-out half of the MD", divergence, "nat"),
        note("chignolin: JS of pair distances, the other half against the held-out half", floor, "nat"),
        at_most("chignolin: JS over the floor", divergence / floor, "x", 2.0),
    ]


def pocket_rows(runs: Path) -> list[Row]:
    """Poses of one held-out ligand per target."""
    from benchmarks.kinds_pockets import pocket_results

    results, minutes = pocket_results(runs, SHARED / "fep_pockets", TARGETS, POSES)
    best = np.array([result.best for result in results])
    clean = float(np.mean([result.without_clash for result in results]))
    checks = sorted({name for result in results for name in result.checks})
    return [
        at_most("pockets: training and sampling", minutes, "min", LONGEST_RECIPE),
        at_least("pockets: ligands read", 100 * float(np.mean([result.read for result in results])), "%", 100),
        *(note(f"pockets: {r.target}, best of {POSES} for {r.ligand}", float(r.best), "Å") for r in results),
        at_least(f"pockets: best of {POSES} below 2 Å", 100 * float((best < 2.0).mean()), "%", 60),
        at_least("pockets: poses without a clash", 100 * clean, "%", 90),
        *(
            note(f"pockets: PoseBusters, {name}", 100 * float(np.mean([r.checks.get(name, 0.0) for r in results])), "%")
            for name in checks
        ),
    ]


def carbon_rows(runs: Path) -> list[Row]:
    """Carbon crystals against a tenth that the model has not seen."""
    from benchmarks.kinds_crystals import samples_by_size, split_frames
    from dig_scale.evaluation.crystals import coordination, densities, shortest_distances, wasserstein

    out, minutes = recipe_run(runs, "carbon", {"CARBON_CSV": SHARED / "carbon_24" / "val.csv"})
    samples, held_out = samples_by_size(out), split_frames(out, VALIDATION)
    both = {
        name: [np.concatenate([np.asarray(measure(s, f)) for s, f in group]) for group in (samples, held_out)]
        for name, measure in (
            ("density", densities),
            ("coordination", lambda s, f: coordination(s, f).mean(1)),
            ("shortest", shortest_distances),
        )
    }
    shortest = both["shortest"][0]
    inside = 100 * float(((shortest > 1.15) & (shortest < 1.75)).mean())
    return [
        at_most("carbon: recipe", minutes, "min", LONGEST_RECIPE),
        note("carbon: samples", float(len(shortest))),
        note("carbon: held-out structures", float(len(both["shortest"][1]))),
        at_least("carbon: shortest C-C in 1.15 to 1.75 Å", inside, "%", 80),
        at_most("carbon: Wasserstein-1 of density", wasserstein(*both["density"]), "g/cm³", 0.15),
        at_most("carbon: Wasserstein-1 of mean coordination", wasserstein(*both["coordination"]), "", 0.15),
    ]


def perovskite_rows(runs: Path) -> list[Row]:
    """Perovskites asked for a low or a high heat of formation, judged by a model that did not guide."""
    from benchmarks.kinds_crystals import perovskite_results

    result = perovskite_results(runs, SHARED / "perov_5" / "half.csv")
    return [
        at_most("perovskites: recipe", result.minutes, "min", LONGEST_RECIPE),
        note("perovskites: error of the judge on held-out structures", result.judge_error, "eV/atom"),
        note("perovskites: compositions that the model has not seen", float(result.compositions)),
        note("perovskites: standard deviation of the open samples of one composition", result.spread, "eV/atom"),
        note("perovskites: from open samples to what is asked for", result.distance, "eV/atom"),
        note("perovskites: shift of those asked for less", result.lowered, "eV/atom"),
        note("perovskites: shift of those asked for more", result.raised, "eV/atom"),
        note("perovskites: shift toward what is asked for", result.shift, "eV/atom"),
        at_least("perovskites: shift over the standard deviation", result.shift / result.spread, "s.d.", 1.0),
    ]


def adsorbate_rows(runs: Path) -> list[Row]:
    """Adsorbates on metals that the model knows, and on one it does not."""
    from benchmarks.kinds_surfaces import surface_results

    results, minutes = surface_results(runs)
    rows = [at_most("adsorbates: recipe", minutes, "min", LONGEST_RECIPE)]
    for r in results:
        bar = 0.05 if r.held_out else 0.02
        where = f"adsorbates: {r.adsorbate} on {r.metal}{' (left out)' if r.held_out else ''}"
        rows.append(at_most(f"{where}, JS of the lateral map", r.divergence, "nat", bar))
        rows.append(note(f"{where}, JS of two halves of the MD", r.floor, "nat"))
        if r.held_out:
            rows.append(at_most(f"{where}, largest error of a site's population", r.population_error, "", 0.1))
            rows.append(at_most(f"{where}, error of the mean height", r.height_error, "Å", 0.1))
    return rows


READING: dict[str, Part] = {
    "frames": lambda runs: frame_rows(SHARED),
    "adk": adk_rows,
    "chignolin": chignolin_rows,
    "pockets": pocket_rows,
    "adsorbates": adsorbate_rows,
    "carbon": carbon_rows,
    "perovskites": perovskite_rows,
    "bad-input": lambda runs: bad_input_rows(SHARED),
}
PARTS: dict[str, Part] = {
    "code": lambda runs: code_rows(),
    "published": lambda runs: published_rows(),
    "rotations": lambda runs: rotation_rows(),
    **{name: with_data(name, part) for name, part in READING.items()},
}


if __name__ == "__main__":
    run_parts(PARTS, __doc__)
