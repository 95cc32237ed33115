"""Step 2 and 3 of the walk: whatever process is killed, at whatever moment, the frames are those of an undisturbed run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dig_shards.trajectory import TrajectoryReader

from dig_scale.config import Recipe
from dig_scale.records import find_trajectories
from dig_scale.simulation.campaign import Progress, simulate
from tests.simulation_runs import actor_processes, python_environment, ray_session, small_ladder, small_recipe

__all__ = ["ray_session"]

_DRIVER = """
import os, signal, sys
from pathlib import Path
from dig_scale.config import Recipe
from dig_scale.simulation.campaign import simulate

recipe, out, kill_at = Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def die_midway(progress):
    if progress.done_ns >= kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

simulate(recipe, out, die_midway)
"""


def _content(out: Path) -> dict[str, str]:
    stores = find_trajectories(out)
    assert all(TrajectoryReader(store).is_finished for store in stores)
    return {store.relative_to(out).as_posix(): TrajectoryReader(store).fingerprint() for store in stores}


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {"single": small_recipe(), "ladder": small_ladder()}
    folders = {name: tmp_path_factory.mktemp(name) for name in runs}
    for name, recipe in runs.items():
        simulate(recipe, folders[name])
    return folders


def _same_start(reference: Path, out: Path) -> None:
    """Give `out` the very System of the reference: the build itself is tested elsewhere."""
    (out / "ala2").mkdir(parents=True)
    (out / "ala2" / "system.json").write_text((reference / "ala2" / "system.json").read_text())


@pytest.mark.parametrize("kind", ["single", "ladder"])
def test_killed_actors_leave_no_trace_in_the_frames(kind: str, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"single": small_recipe, "ladder": small_ladder}[kind]()
    _same_start(undisturbed[kind], tmp_path / "out")
    killed: list[float] = []

    def kill_after_some_chunks(progress: Progress) -> None:
        share = progress.done_ns / progress.total_ns
        if share > 0.2 * (1 + len(killed)) and len(killed) < 2:
            victims = actor_processes()
            if victims:
                victims[len(killed) % len(victims)].kill()
                killed.append(share)

    report = simulate(recipe, tmp_path / "out", kill_after_some_chunks)
    assert killed
    assert report.restarts >= 1
    assert _content(tmp_path / "out") == _content(undisturbed[kind])


def test_killed_driver_is_carried_on_without_a_frame_twice(
    ray_session: None, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    recipe, out = small_ladder(), tmp_path / "out"
    _same_start(undisturbed["ladder"], out)
    total_ns = 2 * 3 * 7 * 0.2e-3
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, recipe.model_dump_json(), str(out), str(0.3 * total_ns)],
        env=python_environment(),
    )
    children = _descendants_until_death(driver)
    assert driver.returncode == -signal.SIGKILL
    frames = [TrajectoryReader(store).n_frames for store in find_trajectories(out)]
    assert 0 < sum(frames) < 2 * 3 * 7
    simulate(recipe, out)
    assert _content(out) == _content(undisturbed["ladder"])
    _end_orphans(children)


def _descendants_until_death(driver: subprocess.Popen[bytes]) -> dict[psutil.Process, str]:
    """Wait for the driver to die; returns the processes it had, with their command lines."""
    found: dict[psutil.Process, str] = {}
    deadline = time.monotonic() + 120
    while driver.poll() is None and time.monotonic() < deadline:
        for child in psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []:
            try:
                found[child] = " ".join(child.cmdline())
            except psutil.Error:
                continue
        time.sleep(0.1)
    driver.wait(timeout=1)
    return found


def _end_orphans(children: dict[psutil.Process, str]) -> None:
    """The killed driver's actors must be gone; Ray's own agents, which may linger, are ended here."""
    _, alive = psutil.wait_procs(children, timeout=10)
    actors = [process for process in alive if "_Actor" in children[process]]
    for process in alive:
        process.kill()
    assert not actors, "actors of the killed driver outlive it"


def test_finished_campaign_returns_at_once_with_its_costs(undisturbed: dict[str, Path]) -> None:
    begin = time.monotonic()
    report = simulate(small_recipe(), undisturbed["single"])
    assert time.monotonic() - begin < 2
    assert [one.status for one in report.replicas] == ["finished", "finished"]
    assert report.cpu_seconds > 0
    assert report.simulated_ns == pytest.approx(2 * 7 * 0.2e-3)
    assert json.loads((undisturbed["single"] / "campaign.json").read_text())["cpu_seconds"] == report.cpu_seconds


def test_replicas_differ_and_do_not_depend_on_each_other(undisturbed: dict[str, Path]) -> None:
    content = _content(undisturbed["single"])
    assert len(set(content.values())) == len(content) == 2


def test_ladder_reports_its_acceptance(undisturbed: dict[str, Path]) -> None:
    report = simulate(small_ladder(), undisturbed["ladder"])
    for one in report.replicas:
        assert len(one.exchange_acceptance) == 2
        assert all(rate is not None and 0 <= rate <= 1 for rate in one.exchange_acceptance)


def _with_frames(recipe: Recipe, frames: int) -> Recipe:
    assert recipe.simulate is not None
    return recipe.model_copy(update={"simulate": recipe.simulate.model_copy(update={"frames": frames})})


def test_folder_of_another_recipe_is_refused(undisturbed: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"simulate\.frames"):
        simulate(_with_frames(small_recipe(), 9), undisturbed["single"])
