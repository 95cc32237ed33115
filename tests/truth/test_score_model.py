"""Symmetries of the score model, the radial table against the direct form, padding, and sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry, collate
from dig_scale.config import Diffusion, Model
from dig_scale.diffusion.composition import composition_for
from dig_scale.model.features import featurise
from dig_scale.model.pair_bias import U_STOP, RadialChannels
from dig_scale.model.score_model import ScoreModel, count_parameters
from dig_scale.recipe_files import bundled_recipes, load_recipe
from dig_scale.system import System, SystemKind
from dig_scale.tree import tree_map
from tests.molecules import alanine_dipeptide_heavy, five_beads

SMALL = Model(layers=2, width=32, heads=4, feed_forward=64, radial_kernels=48, vector_channels=8)
SYSTEMS = {"alanine": alanine_dipeptide_heavy(), "beads": five_beads()}


def lively_model(config: Model = SMALL, seed: int = 0) -> ScoreModel:
    """A model whose every path matters: small initial weights are replaced by order-one ones."""
    torch.manual_seed(seed)
    model = ScoreModel(config)
    with torch.no_grad():
        for layer in (model.head.polar, model.head.axial):
            layer.weight.normal_(std=0.3)
    return model.eval()


def noised(system: System, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.as_tensor(system.reference_positions, dtype=torch.float32)
    x = x - x.mean(0)
    return x + 0.3 * torch.randn(batch, *x.shape, generator=generator)


def random_rotation(seed: int) -> Tensor:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    q[:, 0] *= np.linalg.det(q)
    return torch.as_tensor(q, dtype=torch.float32)


def output(model: ScoreModel, positions: Tensor, context: Context, noise: float) -> Tensor:
    with torch.no_grad():
        return model(Geometry(positions), context, torch.full((len(positions),), noise)).positions


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0, 20.0])
def test_output_rotates_with_the_molecule_and_ignores_translation(name: str, noise: float) -> None:
    model, context, x = lively_model(), featurise(SYSTEMS[name]), noised(SYSTEMS[name], 4)
    rotation, shift = random_rotation(1), torch.tensor([3.0, -2.0, 1.0])
    straight = output(model, x, context, noise)
    turned = output(model, x @ rotation.T + shift, context, noise)
    assert straight.abs().max() > 0.05
    assert torch.allclose(turned, straight @ rotation.T, atol=1e-5 * float(straight.abs().max().clamp(min=1)))


@pytest.mark.parametrize("name", SYSTEMS)
def test_output_is_not_the_mirror_image_for_a_mirror_image(name: str) -> None:
    """Also for five beads in a chain, where no site has four neighbours."""
    model, context, x = lively_model(), featurise(SYSTEMS[name]), noised(SYSTEMS[name], 4)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    difference = output(model, x @ mirror, context, 0.3) - output(model, x, context, 0.3) @ mirror
    assert difference.abs().max() > 1e-2 * output(model, x, context, 0.3).abs().max()


def test_relabelling_sites_relabels_the_output() -> None:
    system, model = SYSTEMS["alanine"], lively_model()
    order = np.random.default_rng(0).permutation(system.n_sites)
    x = noised(system, 3)
    straight = output(model, x, featurise(system), 0.2)
    relabelled = output(model, x[:, order], featurise(system.select(order)), 0.2)
    assert torch.allclose(relabelled, straight[:, order], atol=2e-5)


def test_a_padded_batch_of_two_systems_equals_each_alone() -> None:
    model, (a, b) = lively_model(), SYSTEMS.values()
    contexts = [featurise(a), featurise(b)]
    together = collate(contexts)
    x = torch.zeros(2, a.n_sites, 3)
    x[0], x[1, : b.n_sites] = noised(a, 1)[0], noised(b, 1)[0]
    out = output(model, x, together, 0.2)
    assert torch.allclose(out[0], output(model, noised(a, 1), contexts[0], 0.2)[0], atol=1e-5)
    assert torch.allclose(out[1, : b.n_sites], output(model, noised(b, 1), contexts[1], 0.2)[0], atol=1e-5)
    assert (out[1, b.n_sites :] == 0).all()


@pytest.mark.parametrize("noise", [0.01, 0.2, 5.0])
def test_the_radial_table_equals_the_direct_form(noise: float) -> None:
    table = lively_model()
    direct = ScoreModel(SMALL.model_copy(update={"radial_knots": 0})).eval()
    direct.load_state_dict(table.state_dict())
    system = SYSTEMS["alanine"]
    x, context = noised(system, 4), featurise(system)
    assert torch.allclose(output(table, x, context, noise), output(direct, x, context, noise), atol=1e-4)


def test_the_table_gives_the_gradients_of_the_direct_form() -> None:
    system, gradients = SYSTEMS["alanine"], []
    for knots in (2048, 0):
        model = lively_model(SMALL.model_copy(update={"radial_knots": knots})).double()
        context = featurise(system)
        context = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, context)
        out = model(Geometry(noised(system, 4).double()), context, torch.full((4,), 0.2).double()).positions
        (out**2).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.linalg.norm(gradients[0] - gradients[1]) < 1e-4 * torch.linalg.norm(gradients[1])


def test_a_table_too_coarse_for_its_weights_gives_way_to_the_direct_form(caplog: pytest.LogCaptureFixture) -> None:
    model = lively_model(SMALL.model_copy(update={"radial_knots": 1024}))
    assert model.pair_bias.review_table() < 1e-4 and model.pair_bias.grid is not None
    with torch.no_grad():
        model.pair_bias.radial.log_width -= 3.5  # Gaussians much narrower than the knots are apart
    system = SYSTEMS["alanine"]
    x, context = noised(system, 2), featurise(system)
    direct = ScoreModel(SMALL.model_copy(update={"radial_knots": 0})).eval()
    direct.load_state_dict(model.state_dict())
    assert model.pair_bias.review_table() > 1e-4
    assert "radial_knots" in caplog.text
    assert torch.equal(output(model, x, context, 0.3), output(direct, x, context, 0.3))


def test_radial_slopes_are_the_derivatives() -> None:
    radial = RadialChannels(32, 5).double()
    u = torch.linspace(0.3, U_STOP - 0.3, 101, dtype=torch.float64, requires_grad=True)
    values, slopes = radial(u, 1)
    for channel in range(5):
        (exact,) = torch.autograd.grad(values[:, channel].sum(), u, retain_graph=True)
        assert torch.allclose(slopes[:, channel], exact, atol=1e-10)


def test_score_of_a_free_molecule_leaves_the_centre_of_mass_alone() -> None:
    system = SYSTEMS["alanine"]
    composition, context = composition_for(SystemKind.MOLECULE, Diffusion()), featurise(system)
    state = composition.state({"positions": noised(system, 4)}, context)
    score = composition.as_score_fn(lively_model())(state, context, torch.full((4,), 0.4)).positions
    assert score.mean(1).abs().max() < 1e-4 * score.abs().max()


def test_fixed_sites_get_no_score_and_mobile_ones_do() -> None:
    system = replace(SYSTEMS["alanine"], mobile=np.arange(10) >= 4)
    composition, context = composition_for(SystemKind.MOLECULE, Diffusion()), featurise(system)
    noise = composition.noise(torch.randn(2, composition.normals(context)), context)
    assert (noise.positions[:, :4] == 0).all()
    assert noise.positions[:, 4:].abs().min() > 0
    model = lively_model(SMALL.model_copy(update={"sites": "anchored"}))
    state, t = composition.state({"positions": noised(SYSTEMS["alanine"], 2)}, context), torch.full((2,), 0.4)
    score = composition.as_score_fn(model)(composition.perturb(state, t, noise), context, t)
    assert (score.positions[:, :4] == 0).all()
    assert score.positions[:, 4:].abs().min() > 0


def test_large_recipe_has_a_billion_parameters_and_paper_recipe_the_papers_width() -> None:
    assert count_parameters(load_recipe("large").model) >= 1_000_000_000
    paper = load_recipe("paper").model
    assert (paper.layers, paper.width, paper.heads) == (12, 768, 32)


def test_all_bundled_recipes_load() -> None:
    assert set(bundled_recipes()) >= {"quickstart", "full", "ala2-beads", "tiny", "paper", "large"}
    for name in bundled_recipes():
        assert load_recipe(name).name == name
