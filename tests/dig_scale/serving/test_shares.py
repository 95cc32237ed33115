"""Samples shared among systems: proportional, monotone, into folders that cannot collide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dig_scale.errors import UserError
from dig_scale.serving.shares import folder_names, shares


def test_shares_follow_the_frames() -> None:
    assert shares(100, {"C6": 10, "C8": 30, "C10": 60}) == {"C6": 10, "C8": 30, "C10": 60}
    assert shares(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert shares(3, {"rare": 1, "common": 1000, "none": 0}) == {"rare": 0, "common": 3, "none": 0}


@given(st.lists(st.integers(0, 500), min_size=1, max_size=6).filter(any), st.integers(1, 60))
def test_asking_for_one_more_takes_none_away(frames: list[int], num: int) -> None:
    named = {str(place): size for place, size in enumerate(frames)}
    before, after = shares(num, named), shares(num + 1, named)
    assert sum(before.values()) == num and sum(after.values()) == num + 1
    assert all(after[name] >= count for name, count in before.items())
    quotas = num * np.array(frames) / sum(frames)
    assert (np.abs(np.array(list(before.values())) - quotas) < len(frames)).all()


def test_nothing_to_share_by_is_refused() -> None:
    with pytest.raises(UserError, match="no training system has frames"):
        shares(3, {"a": 0})


def test_two_systems_never_share_a_folder() -> None:
    assert folder_names(["C6", "a/b", "..x"]) == {"C6": "C6", "a/b": "a_b", "..x": "x"}
    with pytest.raises(UserError, match="a_b"):
        folder_names(["a/b", "a b"])
