"""A structure search from a recipe: crystals that can be packed, carried on, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dig_scale.errors import UserError
from dig_scale.recipe_files import parse_recipe
from dig_scale.records import find_trajectories, pack_dataset, read_trajectory_frames
from dig_scale.simulation.ase_search import elements_of
from dig_scale.stages.data import simulate_stage
from dig_scale.system import SystemKind

SEARCH = {"candidates": 3, "volume_per_atom": [10.0, 14.0], "shortest_distance": 1.8, "workers": 1}


def recipe(**changes: object) -> object:
    return parse_recipe(
        {"name": "s", "searches": [SEARCH | {"composition": "Cu2"} | changes], "pack": {"validation_fraction": 0.0}},
        "here",
    )


def test_random_cells_of_copper_relax_into_crystals_that_pack(tmp_path: Path) -> None:
    chosen = recipe()
    for _ in range(2):
        simulate_stage(chosen, tmp_path / "trajectories")
    (store,) = find_trajectories(tmp_path / "trajectories")
    system, frames = read_trajectory_frames(store)
    assert (system.name, system.kind) == ("Cu2", SystemKind.CRYSTAL)
    assert 1 <= frames.n_frames <= 3 and frames.cell is not None and frames.energy is not None
    manifest = pack_dataset(chosen, [tmp_path / "trajectories"], tmp_path / "dataset")
    assert manifest.frames("train") == frames.n_frames


def test_compositions_and_calculators_that_do_not_go_are_named(tmp_path: Path) -> None:
    for changes, words in [
        ({"composition": "Si2"}, r"'Si2': effective medium theory has no parameters for Si \(it has Al, Cu"),
        ({"composition": "Xx2"}, r"composition 'Xx2': no element 'Xx'"),
        ({"composition": "2Cu"}, r"composition '2Cu'; expected elements and their numbers"),
        ({"calculator": {"name": "pyscf"}}, r"'pyscf' has no stress here"),
        ({"shortest_distance": 9.0}, r"allow more volume or shorter distances"),
    ]:
        with pytest.raises(UserError, match=words):
            simulate_stage(recipe(**changes), tmp_path / "nothing")
    assert elements_of("Cu3Al").tolist() == [13, 29, 29, 29]
