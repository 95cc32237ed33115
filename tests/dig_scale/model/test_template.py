"""A template laid on a chain: exact where the chain is its template, turning with it, silent where residues are missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.config import Model
from dig_scale.geometry.rotations import random_rotations
from dig_scale.model.features import featurise
from dig_scale.model.template import laid_template
from dig_scale.template_layout import LENGTH, PLACES, TEMPLATE_FEATURES, TURNS
from tests.kinds import case, doubled, lively_model

NOISE = torch.full((3,), 0.7).double()
KEPT = 5e-3
"""Systems keep features as fp16."""
READS = {"site_features": TEMPLATE_FEATURES, "superposed_template": True}


def template(missing: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places [N, 3] Å, turns [N, 3, 3], and the site features that tell them."""
    count, generator = case("protein").system.n_sites, np.random.default_rng(5)
    places = generator.normal(0, 5.0, (count, 3))
    turns = random_rotations(torch.randn(1, count, 4, generator=torch.Generator().manual_seed(5)).double())[0].numpy()
    features = generator.normal(size=(count, TEMPLATE_FEATURES))
    features[:, PLACES], features[:, TURNS] = places / LENGTH, turns.reshape(count, 9)
    features[list(missing)] = 0.0
    return places, turns, features


def context_of(missing: tuple[int, ...] = ()) -> Context:
    return doubled(featurise(replace(case("protein").system, site_features=template(missing)[2])))


def random_turn(seed: int) -> Tensor:
    return random_rotations(torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(seed)).double())[0, 0]


def seen() -> Geometry:
    frames = case("protein").frames
    return Geometry(frames["positions"], frames["rotations"])


@pytest.mark.parametrize("missing", [(), (0, 3)])
def test_a_chain_that_is_its_template_is_at_its_places(missing: tuple[int, ...]) -> None:
    places, turns, _ = template(missing)
    turn, kept = random_turn(1), [site for site in range(len(places)) if site not in missing]
    there = Geometry(
        (torch.as_tensor(places) @ turn.T + 4.0).expand(3, -1, -1),
        (turn @ torch.as_tensor(turns)).expand(3, -1, -1, -1),
    )
    laid = laid_template(there, context_of(missing), NOISE)
    identity = torch.eye(3).double().flatten().expand(3, len(kept), 9)
    torch.testing.assert_close(laid.vectors[:, :, 0], torch.zeros_like(laid.vectors[:, :, 0]), atol=KEPT, rtol=0)
    torch.testing.assert_close(laid.seen[:, kept, 6:15], identity, atol=KEPT, rtol=0)
    assert (laid.seen[:, kept, 15] == 1).all()
    assert not laid.seen[:, list(missing)].any() and not laid.vectors[..., list(missing)].any()


def test_a_mirror_image_is_never_laid_upon() -> None:
    places, turns, _ = template()
    mirrored = Geometry(torch.as_tensor(-places).expand(3, -1, -1), torch.as_tensor(turns).expand(3, -1, -1, -1))
    assert laid_template(mirrored, context_of(), NOISE).vectors[:, :, 0].norm(dim=1).max() > 1


def test_it_turns_with_the_chain_and_frames_see_the_same() -> None:
    turn, straight = random_turn(2), seen()
    turned = Geometry(straight.positions @ turn.T + 3.0, turn @ straight.rotations)
    before, after = (laid_template(one, context_of(), NOISE) for one in (straight, turned))
    torch.testing.assert_close(after.seen, before.seen, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.vectors, torch.einsum("ca,bamn->bcmn", turn, before.vectors), atol=1e-9, rtol=0)


def test_the_network_turns_with_the_chain_and_reads_the_template() -> None:
    model, turn, straight = lively_model("residues", **READS), random_turn(3), seen()
    with torch.no_grad():
        found = model(straight, context_of(), NOISE)
        turned = model(Geometry(straight.positions @ turn.T + 3.0, turn @ straight.rotations), context_of(), NOISE)
        without = model(straight, context_of((1, 2)), NOISE)
    torch.testing.assert_close(turned.positions, found.positions @ turn.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(turned.rotations, found.rotations, atol=1e-9, rtol=0)
    assert (without.positions - found.positions).abs().max() > 1e-3


def test_derivatives_through_the_superposition_are_exact() -> None:
    context, frames = context_of((4,)), seen().rotations[:1]

    def laid(positions: Tensor) -> Tensor:
        return laid_template(Geometry(positions, frames), context, NOISE[:1]).seen

    assert torch.autograd.gradcheck(laid, seen().positions[:1].clone().requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"sites": "atoms"}, {"site_features": 384}])
def test_models_without_a_template_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"superposed_template is for sites = 'residues' with site_features = 42"):
        Model.model_validate({"sites": "residues"} | READS | wrong)
