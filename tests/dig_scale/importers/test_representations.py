"""AlphaFold2's representations from .npz, .pkl and BioEmu's cache; no pickle runs code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dig_scale.errors import UserError
from dig_scale.importers.representations import read_representation

ARRAYS = {
    "single": np.random.default_rng(0).standard_normal((4, 384)).astype(np.float32),
    "pair": np.random.default_rng(1).standard_normal((4, 4, 128)).astype(np.float32),
}


def pickled(content: Any, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def assert_read(path: Path) -> None:
    found = read_representation(path)
    assert found.residues == 4
    assert found.single.dtype == found.pair.dtype == np.float32
    np.testing.assert_array_equal(found.single, ARRAYS["single"])
    np.testing.assert_array_equal(found.pair, ARRAYS["pair"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    assert_read(pickled(ARRAYS, tmp_path / "1ake.pkl", protocol))


def test_alphafold_results_are_read_among_their_other_entries(tmp_path: Path) -> None:
    result = {
        "representations": ARRAYS | {"msa": np.zeros((2, 4, 256), np.float16)},
        "plddt": np.ones(4),
        "ptm": np.float64(0.8),
        "ranking_confidence": 91.5,
        "names": ["a", ("b", 3, None, True)],
    }
    assert_read(pickled(result, tmp_path / "result_model_1.pkl"))


def test_npz_and_the_cache_of_two_files_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "1ake.npz", **{name: array.astype(np.float64) for name, array in ARRAYS.items()})
    assert_read(tmp_path / "1ake.npz")
    for name, array in ARRAYS.items():
        np.save(tmp_path / f"abc_{name}.npy", array)
    assert_read(tmp_path / "abc_single.npy")


class Danger:
    """Creates a file when unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (self.target, "w")


class Hidden:
    """Asks for something harmless-looking that is no array."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return np.load, ("x",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_cannot_run_code(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "written"
    path = pickled(ARRAYS | {"extra": Danger(str(target))}, tmp_path / "danger.pkl", protocol)
    with pytest.raises(UserError, match=r"danger\.pkl: the pickle asks for .*open.*save single and pair as an \.npz"):
        read_representation(path)
    assert not target.exists()
    with pytest.raises(UserError, match="only numpy arrays and plain values"):
        read_representation(pickled({"single": Hidden()}, tmp_path / "hidden.pkl", protocol))


def test_arrays_of_objects_are_no_representation(tmp_path: Path) -> None:
    content = ARRAYS | {"single": np.array([None] * 4, dtype=object)}
    with pytest.raises(UserError, match="single is a object, expected an array of numbers"):
        read_representation(pickled(content, tmp_path / "objects.pkl"))
    np.savez(tmp_path / "objects.npz", **content)
    with pytest.raises(UserError, match=r"objects\.npz is not a readable \.npz"):
        read_representation(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"single": ARRAYS["single"]}, r"no 'pair' among \['single'\]"),
        (ARRAYS | {"single": np.zeros((4, 256))}, r"single has shape \(4, 256\), expected \(4, 384\)"),
        (ARRAYS | {"pair": np.zeros((3, 3, 128))}, r"pair has shape \(3, 3, 128\), expected \(4, 4, 128\)"),
        (ARRAYS | {"single": np.full((4, 384), np.nan)}, "single has entries that are not finite"),
        ([1, 2], "holds a list, expected a dict"),
    ],
)
def test_what_does_not_fit_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_representation(pickled(content, tmp_path / "misfit.pkl"))


def test_files_that_are_not_there_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no representations at"):
        read_representation(tmp_path / "absent.pkl")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(ARRAYS)[:500])
    with pytest.raises(UserError, match=r"cut\.pkl is not a readable pickle"):
        read_representation(tmp_path / "cut.pkl")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"not from '\.txt'"):
        read_representation(tmp_path / "notes.txt")
    np.save(tmp_path / "lonely_single.npy", ARRAYS["single"])
    with pytest.raises(UserError, match=r"with <name>_pair\.npy beside it"):
        read_representation(tmp_path / "lonely_single.npy")
