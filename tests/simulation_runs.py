"""Small simulation recipes and a Ray for them, shared by tests of campaigns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dig_scale.config import Recipe, ReplicaExchange, Simulate, SystemSpec
from dig_scale.ray_token import share_ray_token

ROOT = Path(__file__).parent.parent
SOURCE_FOLDERS = (ROOT, ROOT / "kernels", ROOT / "data_shards")


def small_recipe(**simulate: object) -> Recipe:
    """Alanine dipeptide, two replicas of seven frames in chunks of two, a second of work in all."""
    settings: dict[str, object] = {
        "frames": 7,
        "chunk_frames": 2,
        "frame_spacing_ps": 0.2,
        "equilibration_ps": 0.4,
        "replicas": 2,
        "actors": 2,
        "seed": 5,
    }
    return Recipe(
        name="ala2-small",
        systems=(SystemSpec(name="ala2", sequence="ACE-ALA-NME"),),
        simulate=Simulate.model_validate(settings | simulate),
    )


def small_ladder() -> Recipe:
    """The small recipe with three temperatures and an exchange every two and a half frames."""
    exchange = ReplicaExchange(temperatures=(300.0, 360.0, 430.0), exchange_interval_ps=0.08)
    return small_recipe(replica_exchange=exchange)


def python_environment() -> dict[str, str]:
    """The environment of a Python process that imports the sources of this checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(folder) for folder in SOURCE_FOLDERS)}


def actor_processes() -> list[psutil.Process]:
    """Live simulation actors started by this process, and by no other."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Actor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A Ray of two cores that lives as long as the test module, unless one is up already."""
    import ray

    if ray.is_initialized():
        yield
        return
    share_ray_token()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_environment()["PYTHONPATH"]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
