"""A kind of system that the project does not know is an importer and an entry in two registries: no other file knows it.

From BOND to `polymers` stands the whole extension, a ring polymer of coloured beads.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dig_scale.batch import Context
from dig_scale.diffusion.composition import COMPOSITIONS, positions_alone
from dig_scale.errors import UserError
from dig_scale.model.features import FEATURES, atomistic
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import SOLVERS
from dig_scale.serving.served import build_bench, load_served_model
from dig_scale.system import System
from dig_scale.training.data import open_split
from dig_scale.training.metrics import read_metrics
from dig_scale.training.trainer import train
from tests.dig_scale.training.small_runs import make_dataset, one_rank, small_recipe

__all__ = ["one_rank"]

BOND = 3.0


def polymer_from_text(name: str, text: str) -> System:
    """A ring polymer written as its beads, as in ABBA; bonds of 3 Å."""
    n = len(text)
    if n < 3 or set(text) - set("AB"):
        raise UserError(f"polymer {name!r}: {text!r}, expected three or more of the letters A and B")
    angle = 2 * math.pi * np.arange(n) / n
    radius = BOND / (2 * math.sin(math.pi / n))
    return System(
        name=name,
        kind="polymer",
        elements=np.array(["AB".index(letter) + 1 for letter in text]),
        atom_names=tuple(text),
        residue_names=("BEA",) * n,
        residue_index=np.arange(n),
        chain_index=np.zeros(n),
        bonds=np.sort([(i, (i + 1) % n) for i in range(n)], axis=1),
        bond_orders=np.ones(n),
        formal_charges=np.zeros(n),
        stereocentres=np.zeros((0, 4)),
        mobile=np.ones(n, bool),
        reference_positions=radius * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1),
    )


def polymer(system: System) -> Context:
    """A free ring whose radius of gyration is that of an ideal chain."""
    n = system.n_sites
    extent = BOND * math.sqrt(n / 36)
    return atomistic(system, np.zeros((n, 3)), np.full(n, extent), np.ones(1, bool))


@pytest.fixture
def polymers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind, registered."""
    monkeypatch.setitem(FEATURES, "polymer", polymer)
    monkeypatch.setitem(COMPOSITIONS, "polymer", positions_alone)


@pytest.mark.usefixtures("polymers", "one_rank")
def test_a_new_kind_is_packed_trained_and_sampled(tmp_path: Path) -> None:
    ring = polymer_from_text("ring", "ABBABA")
    dataset = make_dataset(tmp_path, [ring], 40)
    recipe = small_recipe(steps=2, validate_every=2, checkpoint_every=2, warmup_steps=0)
    train(recipe, dataset, tmp_path / "run")
    assert [math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run") if row["kind"] == "train"] == [
        True
    ] * 2
    model = load_served_model(tmp_path / "run", torch.device("cpu"))
    bench = build_bench(model, model.systems["ring"])
    assert bench.system.kind == "polymer"
    with torch.inference_mode():
        drawn = sample(bench.score_fn, bench.composition, bench.context, SOLVERS["ancestral"], 6, 1, torch.arange(4))
    positions = bench.composition.arrays(drawn, bench.context)["positions"]
    assert positions.shape == (4, 6, 3)
    assert positions.isfinite().all()


def test_a_kind_that_is_not_registered_is_kept_and_refused_where_it_is_used(tmp_path: Path) -> None:
    ring = polymer_from_text("ring", "ABBABA")
    again = System.from_json(ring.to_json())
    assert again.kind == "polymer"
    assert again.system_id == ring.system_id
    dataset = make_dataset(tmp_path, [ring], 20)
    with pytest.raises(
        UserError, match=r"'ring': no features for systems of kind 'polymer'; known kinds: protein, mol"
    ):
        open_split(dataset, "train", small_recipe(), torch.device("cpu"))
