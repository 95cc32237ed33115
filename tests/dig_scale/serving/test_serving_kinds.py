"""Every kind of system over HTTP: rotations and cells arrive as offline sampling gives them, and so do wanted properties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dig_scale.config import Condition, Model, Pack, Recipe, Sample, Serve
from dig_scale.ensemble import Ensemble
from dig_scale.model.checkpoint import FILE_NAME, Checkpoint, save_checkpoint
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import solver_named
from dig_scale.serving.api import Door, Service, open_service
from dig_scale.serving.client import ServerError, request_ensemble
from dig_scale.serving.schema import SamplesRequest
from dig_scale.serving.served import Wanted, build_bench
from tests.dig_scale.serving.fixtures import answering
from tests.kinds import SMALL, case, lively_model

_ATOL = 1e-3
Open = Callable[..., "Opened"]
_GAP = Condition(name="gap", centre=1.0, spread=0.5)


def save(folder: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint of a small model that answers for a kind of system, with lively weights."""
    found = case(kind)
    recipe = Recipe(
        name=kind,
        model=Model.model_validate(SMALL | {"sites": found.sites} | changes),
        pack=Pack(atoms="residues" if found.sites == "residues" else "all"),
        sample=Sample(steps=5),
    )
    model = lively_model(found.sites, **changes).float()
    if model.strain_head is not None:  # so that no cell of a network that was never trained collapses
        model.strain_head.requires_grad_(False).isotropic.weight.mul_(0.1)
        model.strain_head.weights.weight.mul_(0.1)
    weights = model.state_dict()
    average = {name: values.clone() for name, values in weights.items()}
    return save_checkpoint(folder / FILE_NAME, Checkpoint(weights, average, recipe, (found.system,), step=1))


@dataclass(frozen=True)
class Opened:
    """A service and where it answers."""

    service: Service
    url: str


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens a service of a kind of system."""
    with ExitStack() as stack:

        def open_kind(kind: str, **changes: Any) -> Opened:
            service = open_service(save(tmp_path, kind, **changes), Serve(max_batch=4), torch.device("cpu"))
            stack.callback(service.worker.stop)
            return Opened(service, stack.enter_context(answering(service, Door())))

        yield open_kind


def offline(service: Service, ensemble: Ensemble, wanted: Wanted) -> dict[str, np.ndarray]:
    """What offline sampling gives for the indices of an ensemble, in one batch."""
    bench, how = build_bench(service.model, ensemble.system, wanted), ensemble.provenance
    index = torch.as_tensor(ensemble.index)
    with torch.inference_mode():
        solver = solver_named(how["solver"])
        state = sample(bench.score_fn, bench.composition, bench.context, solver, how["steps"], ensemble.seed, index)
    return {name: values.numpy() for name, values in bench.composition.arrays(state, bench.context).items()}


def assert_as_offline(service: Service, ensemble: Ensemble, wanted: Wanted | None = None) -> None:
    expected = offline(service, ensemble, wanted or Wanted())
    given = {name: getattr(ensemble, name) for name in ("positions", "rotations", "cell")}
    given = {name: values for name, values in given.items() if values is not None}
    assert given.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(given[name], values, atol=_ATOL, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("protein", {"rotations"}), ("crystal", {"cell"}), ("catalyst", set()), ("pocket", set())],
)
def test_samples_of_every_kind_are_those_of_offline_sampling(opened: Open, kind: str, fields: set[str]) -> None:
    server = opened(kind)
    name = case(kind).system.name
    ensemble = request_ensemble(server.url, SamplesRequest(system=name, num=6, seed=3, first_index=2, chunk=4))
    assert {field for field in ("rotations", "cell") if getattr(ensemble, field) is not None} == fields
    assert ensemble.index.tolist() == list(range(2, 8))
    assert_as_offline(server.service, ensemble)


def test_wanted_properties_condition_the_samples_of_their_request_alone(opened: Open) -> None:
    server = opened("crystal", conditions=(_GAP,))
    asked = [
        ({"gap": -60.0}, 2.0),
        ({"gap": 60.0}, None),
        (None, None),
    ]
    ensembles = [
        request_ensemble(server.url, SamplesRequest(system="crystal", num=3, conditions=conditions, guidance=guidance))
        for conditions, guidance in asked
    ]
    for ensemble, (conditions, guidance) in zip(ensembles, asked, strict=True):
        assert_as_offline(server.service, ensemble, Wanted(conditions or {}, guidance or 1.0))
        assert ensemble.provenance.get("conditions") == conditions
    evaluations = [ensemble.provenance["network_evaluations_per_sample"] for ensemble in ensembles]
    assert evaluations[0] == 2 * evaluations[1] == 2 * evaluations[2]
    cells = np.stack([ensemble.cell for ensemble in ensembles])
    assert np.abs(cells[0] - cells[1]).max() > 10 * _ATOL
    assert np.abs(cells[1] - cells[2]).max() > 10 * _ATOL


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"conditions": {"colour": 1.0}}, "its properties are gap"),
        ({"guidance": 3.0}, "towards nothing"),
    ],
)
def test_properties_that_cannot_be_asked_for_are_refused_by_name(
    opened: Open, wish: dict[str, Any], words: str
) -> None:
    server = opened("crystal", conditions=(_GAP,))
    with pytest.raises(ServerError, match=rf"HTTP 422.*conditions.*{words}"):
        request_ensemble(server.url, SamplesRequest(system="crystal", num=1, **wish))


def test_a_sequence_becomes_residues_where_the_model_is_of_residues(opened: Open) -> None:
    server = opened("protein")
    ensemble = request_ensemble(server.url, SamplesRequest(sequence="ACE-GLY-TRP-ALA-NME", num=2))
    assert ensemble.system.residue_names == ("GLY", "TRP", "ALA")
    assert ensemble.rotations is not None
    turned = ensemble.rotations @ ensemble.rotations.swapaxes(-1, -2)
    np.testing.assert_allclose(turned, np.broadcast_to(np.eye(3), turned.shape), atol=1e-4)
