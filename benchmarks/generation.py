"""Generation against bare OpenMM: ns/day of a campaign's two actors over that of two plain loops at the same time.

Both sides run alanine dipeptide on the same platform, one process per replica, and take positions, energy and forces of
every frame; the campaign also checks, stores and journals them. Rounds alternate, and the median ratio counts, since the
host may be shared. Rates are steady: from the end of the first chunk to the end of the last, replica by replica.

    python benchmarks/generation.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import openmm
import ray
from openmm import unit

from benchmarks.rows import Row, at_least, note, publish
from dig_scale.config import Recipe, Simulate, SystemSpec
from dig_scale.ray_token import share_ray_token
from dig_scale.simulation.campaign import simulate
from dig_scale.simulation.openmm_engine import build_openmm_system
from dig_scale.system import System
from dig_scale.units import ANGSTROM_PER_NM, PS_PER_FS, PS_PER_NS, SECONDS_PER_DAY

BAR = 0.95
_REPLICAS = 2
_STEP_FS = 4.0
SETTINGS = Simulate(
    time_step_fs=_STEP_FS, frames=750, chunk_frames=250, equilibration_ps=5.0, replicas=_REPLICAS, actors=_REPLICAS
)


@dataclass(frozen=True)
class Run:
    """Steady ns/day of both replicas together, and all the CPU seconds they took."""

    ns_per_day: float
    cpu_seconds: float


def campaign_run(folder: Path) -> Run:
    """A campaign in `folder`; its rate follows from the times at which chunks were stored."""
    recipe = Recipe(name="generation", systems=(SystemSpec(name="ala2", sequence="ACE-ALA-NME"),), simulate=SETTINGS)
    report = simulate(recipe, folder)
    stored = [
        sorted(chunk.stat().st_mtime for chunk in (store / "positions").glob("c.*")) for store in report.trajectories
    ]
    return Run(sum(_ns_per_day(times) for times in stored), report.cpu_seconds)


def prepared(folder: Path) -> tuple[System, str]:
    """The system and the platform of a campaign."""
    content = json.loads((folder / "ala2" / "system.json").read_text())
    return System.from_dict(content["system"]), content["platform"]


def bare_run(system: System, platform: str) -> Run:
    """The same number of plain OpenMM loops, in processes of their own."""
    with multiprocessing.get_context("spawn").Pool(_REPLICAS) as pool:
        results = pool.starmap(_bare_loop, [(system, platform, k) for k in range(_REPLICAS)])
    return Run(sum(_ns_per_day(times) for times, _ in results), sum(cpu for _, cpu in results))


def _bare_loop(system: System, platform: str, seed: int) -> tuple[list[float], float]:
    """Times at which chunks ended, and CPU seconds in all."""
    begin = time.process_time()
    time_step = _STEP_FS * PS_PER_FS
    integrator = openmm.LangevinMiddleIntegrator(SETTINGS.temperature, SETTINGS.friction_per_ps, time_step)
    properties = {"Threads": "1"} if platform == "CPU" else {}
    model = build_openmm_system(system, SETTINGS)
    context = openmm.Context(model, integrator, openmm.Platform.getPlatformByName(platform), properties)
    context.setPositions(system.reference_positions / ANGSTROM_PER_NM)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(SETTINGS.temperature, seed + 1)
    integrator.step(round(SETTINGS.equilibration_ps / time_step))
    steps, frames, ends = round(SETTINGS.frame_spacing_ps / time_step), [], []
    for number in range(1, SETTINGS.frames + 1):
        integrator.step(steps)
        state = context.getState(getPositions=True, getEnergy=True, getForces=True)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        frames.append((state.getPositions(asNumpy=True), energy, state.getForces(asNumpy=True)))
        if number % SETTINGS.chunk_frames == 0:
            ends.append(time.time())
    return ends, time.process_time() - begin


def _ns_per_day(chunk_ends: list[float]) -> float:
    simulated_ns = (len(chunk_ends) - 1) * SETTINGS.chunk_frames * SETTINGS.frame_spacing_ps / PS_PER_NS
    return simulated_ns / (chunk_ends[-1] - chunk_ends[0]) * SECONDS_PER_DAY


def measure(rounds: int) -> list[Row]:
    """Alternate campaign and bare loops; the ratio is the median over rounds."""
    ours, bare, costs, bare_costs = [], [], [], []
    share_ray_token()
    ray.init("local", num_cpus=_REPLICAS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for k in range(rounds):
                folder = Path(scratch) / str(k)
                campaign, loops = campaign_run(folder), bare_run(*prepared(folder))
                ours.append(campaign.ns_per_day)
                bare.append(loops.ns_per_day)
                costs.append(campaign.cpu_seconds)
                bare_costs.append(loops.cpu_seconds)
    finally:
        ray.shutdown()
    ratio = statistics.median(one / two for one, two in zip(ours, bare, strict=True))
    cost = statistics.median(one / two for one, two in zip(bare_costs, costs, strict=True))
    return [
        note("generation, two actors", statistics.median(ours), "ns/day"),
        note("bare OpenMM, two processes", statistics.median(bare), "ns/day"),
        at_least("generation over bare OpenMM", ratio, "ratio", BAR),
        note("same, per CPU second of the loops", cost, "ratio"),
    ]


def main() -> None:
    """Print the rows, and write them where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    arguments = parser.parse_args()
    publish(measure(arguments.rounds), arguments.json)


if __name__ == "__main__":
    main()
