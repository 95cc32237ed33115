"""Frames are ordered by time, halves are taken within trajectories, sites are matched by name or refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dig_scale.errors import UserError
from dig_scale.evaluation import ReferenceSet, reference_from_frames
from dig_scale.evaluation.reference import first_halves, match_sites, ordered_by_time
from dig_scale.system import Frames, System
from tests.dig_scale.evaluation.conftest import RealTrajectory
from tests.molecules import alanine_dipeptide_heavy, five_beads


def test_heavy_atoms_find_themselves_among_all_atoms_in_another_order(alanine: RealTrajectory) -> None:
    shuffled = alanine.system.select(np.random.default_rng(0).permutation(22))
    heavy = alanine.system.select(alanine.system.heavy_sites())
    sites = match_sites(heavy, shuffled)
    assert [shuffled.site_label(i).split(" ")[0] for i in sites] == [
        heavy.site_label(i).split(" ")[0] for i in range(10)
    ]


def test_sites_that_the_reference_lacks_are_named() -> None:
    with pytest.raises(UserError, match=r"lacks ACE1:CH3.*ACE1:O.*5 of 10 sites match"):
        match_sites(alanine_dipeptide_heavy(), five_beads())


def test_fewer_than_four_sites_are_refused() -> None:
    small = alanine_dipeptide_heavy().select([1, 3, 4])
    with pytest.raises(UserError, match="too few sites"):
        match_sites(small, alanine_dipeptide_heavy())


def test_two_chains_are_told_apart_and_namesakes_are_refused() -> None:
    one = alanine_dipeptide_heavy()
    double = _twice(one, chain_index=np.repeat([0, 1], 10))
    reversed_sites = np.arange(20)[::-1]
    assert match_sites(double.select(reversed_sites), double).tolist() == reversed_sites.tolist()
    namesakes = _twice(one, chain_index=np.zeros(20, int))
    with pytest.raises(UserError, match="has the name of another site"):
        match_sites(namesakes.select(reversed_sites), namesakes)


def test_frames_are_sorted_by_time_within_each_trajectory() -> None:
    system = alanine_dipeptide_heavy()
    values = np.arange(6.0)[:, None, None] * np.ones((6, 10, 3))
    times = np.array([20.0, 0.0, 10.0])
    reference = reference_from_frames(
        system, [Frames(values[:3], times, energy=times), Frames(values[3:], times, energy=times)]
    )
    assert reference.positions[:, 0, 0].tolist() == [1, 2, 0, 4, 5, 3]
    assert reference.energy is not None
    assert reference.energy.tolist() == [0, 10, 20] * 2
    mixed = ReferenceSet(system, values, np.array([1, 0, 1, 0, 1, 0]), np.arange(6.0)[::-1])
    assert ordered_by_time(mixed).positions[:, 0, 0].tolist() == [5, 3, 1, 4, 2, 0]


def test_halves_are_first_halves_of_every_trajectory() -> None:
    assert first_halves(np.array([0, 0, 0, 0, 1, 1, 1])).tolist() == [True, True, False, False, True, False, False]


def test_energies_need_every_trajectory() -> None:
    x, t = np.zeros((2, 10, 3)), np.arange(2.0)
    reference = reference_from_frames(alanine_dipeptide_heavy(), [Frames(x, t, energy=t), Frames(x, t)])
    assert reference.energy is None


def test_bad_references_are_refused_with_their_source() -> None:
    system = alanine_dipeptide_heavy()
    with pytest.raises(UserError, match=r"my\.zarr.*positions \(3, 9, 3\)"):
        ReferenceSet(system, np.zeros((3, 9, 3)), np.zeros(3), np.zeros(3), source="my.zarr")
    broken = np.zeros((3, 10, 3))
    broken[1, 4] = np.nan
    with pytest.raises(UserError, match=r"1 of 3 frames.*frame 1"):
        ReferenceSet(system, broken, np.zeros(3), np.zeros(3))
    with pytest.raises(UserError, match="no trajectory"):
        reference_from_frames(system, [])


def _twice(one: System, chain_index: np.ndarray) -> System:
    return replace(
        one.select(np.tile(np.arange(10), 2)),
        chain_index=chain_index,
        bonds=np.zeros((0, 2), int),
        bond_orders=np.zeros(0, int),
        stereocentres=np.zeros((0, 4), int),
    )
