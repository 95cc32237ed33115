"""DiG's protein network against numbers of the published modules, a plain form of its attention, and its symmetries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dig_scale.model.published.protein import ProteinNet
from dig_scale.model.published.structure import (
    PairWork,
    PointAttention,
    Pose,
    SequenceOffset,
    StructureSizes,
)
from tests.dig_scale.model.published.published_files import (
    protein_inputs,
    protein_table,
    random_state,
    rotations_of,
    small_protein_table,
    wave,
    waves,
)

SMALL = StructureSizes(width=64, pair_width=16, layers=2, heads=4, hidden=32)


def small_net() -> ProteinNet:
    net = ProteinNet(SMALL)
    net.load_state_dict(random_state(small_protein_table(), scale=0.2))
    return net.eval()


def answers(net: ProteinNet, pose: Pose, step: int = 123) -> tuple[Tensor, Tensor]:
    single, pair, _, _ = protein_inputs(pose.positions.shape[1])
    with torch.no_grad():
        return net(pose, torch.full((len(pose.positions),), step), net.condition(single, pair))


def poses(batch: int, residues: int, seed: int = 0) -> Pose:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randn(batch, residues, 3, generator=generator)
    return Pose(5 * torch.randn(batch, residues, 3, generator=generator), rotations_of(angles))


def test_numbers_of_the_published_network() -> None:
    with torch.device("meta"):
        net = ProteinNet()
    net.load_state_dict(waves(protein_table(), 0.02), assign=True)
    single, pair, positions, inverse = protein_inputs(7)
    with torch.no_grad():
        pose = Pose(positions.unsqueeze(0), inverse.mT.unsqueeze(0))
        translation, rotation = net.eval()(pose, torch.tensor([123]), net.condition(single, pair))
    expected = [[0.12543581, -0.08659660, 0.07221003], [0.16512060, -0.11101817, 0.08427774]]
    torch.testing.assert_close(translation[0, [0, 6]], torch.tensor(expected), atol=1e-5, rtol=0)
    # The published network turns R^T from the left, which changes the sign of a turn of R from the right.
    expected = [[0.12295051, -0.02995676, -0.10377105], [0.16854635, -0.03900322, -0.15241042]]
    torch.testing.assert_close(-rotation[0, [0, 6]], torch.tensor(expected), atol=1e-5, rtol=0)


def plain_attention(attn: PointAttention, x: Tensor, pair: Tensor, pose: Pose) -> Tensor:
    """The formula with every pair written out, in double precision."""
    attn, x, pair = attn.double(), x.double(), pair.double()
    positions, rotations = pose.positions.double(), pose.rotations.double()
    heads = attn.heads
    q, k, v = (f(x).unflatten(-1, (heads, -1)) for f in (attn.scalar_query, attn.scalar_key, attn.scalar_value))
    points = []
    for layer in (attn.point_query, attn.point_key, attn.point_value):
        local = layer(x).unflatten(-1, (heads, -1, 3))
        points.append(torch.einsum("bnij,bnhpj->bnhpi", rotations, local) + positions[:, :, None, None])
    qp, kp, vp = points
    gamma = torch.nn.functional.softplus(attn.trained_point_weight) / math.sqrt(54)
    apart = (qp.unsqueeze(2) - kp.unsqueeze(1)).norm(dim=-1).sum(-1)
    logits = torch.einsum("bihc,bjhc->bijh", q, k) / math.sqrt(3 * q.shape[-1]) - 0.5 * gamma * apart
    logits = logits + attn.pair_bias(pair) / math.sqrt(3)
    if pose.known is not None:
        logits = logits.masked_fill(~pose.known[:, None, :, None], float("-inf"))
    weights = logits.softmax(2)
    found = torch.einsum("bijh,bjhpc->bihpc", weights, vp) - positions[:, :, None, None]
    local = torch.einsum("bnji,bnhpj->bnhpi", rotations, found)
    of_pairs = torch.einsum("bijh,ijhc->bihc", weights, attn.pair_value(pair).unflatten(-1, (heads, -1)))
    scalar = torch.einsum("bijh,bjhc->bihc", weights, v)
    parts = [scalar.flatten(2), local.flatten(2), of_pairs.flatten(2), local.norm(dim=-1).flatten(2)]
    return attn.fc_out(torch.cat(parts, -1))


def test_attention_is_its_formula_with_and_without_unknown_residues() -> None:
    generator = torch.Generator().manual_seed(3)
    attn = small_net().st_module.encoder.get_submodule("layers.0.attn")
    assert isinstance(attn, PointAttention)
    x, pair = torch.randn(3, 9, 64, generator=generator), torch.randn(9, 9, 16, generator=generator)
    pose = poses(3, 9)
    known = torch.ones(3, 9, dtype=torch.bool)
    known[1, 4:6] = known[2, 0] = False
    for given in (pose, Pose(pose.positions, pose.rotations, known)):
        found = attn.float()(x, pair, PairWork.of(given))
        torch.testing.assert_close(found, plain_attention(attn, x, pair, given).float(), atol=1e-5, rtol=1e-5)


def test_turning_and_moving_a_chain_turns_translations_and_leaves_rotations() -> None:
    net, pose = small_net(), poses(2, 8)
    turn = rotations_of(torch.tensor([[0.3, -1.1, 0.7]]))[0]
    moved = Pose(pose.positions @ turn.T + torch.tensor([4.0, -2.0, 9.0]), turn @ pose.rotations)
    (a, u), (b, v) = answers(net, pose), answers(net, moved)
    assert a.abs().max() > 0.1
    torch.testing.assert_close(b, a @ turn.T, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(v, u, atol=2e-5, rtol=1e-4)


def test_a_mirror_image_is_told_from_its_original() -> None:
    net, pose = small_net(), poses(1, 8)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    _, rotation = answers(net, pose)
    _, of_mirror = answers(net, Pose(pose.positions @ mirror, mirror @ pose.rotations @ mirror))
    assert (rotation - of_mirror).abs().max() > 1e-2


def test_samples_do_not_see_each_other_and_steps_are_per_sample() -> None:
    net, pose = small_net(), poses(3, 7)
    single, pair, _, _ = protein_inputs(7)
    protein, steps = net.condition(single, pair), torch.tensor([0, 250, 499])
    with torch.no_grad():
        together = net(pose, steps, protein)
        for b in range(3):
            alone = net(Pose(pose.positions[b : b + 1], pose.rotations[b : b + 1]), steps[b : b + 1], protein)
            for x, y in zip(together, alone, strict=True):
                torch.testing.assert_close(x[b : b + 1], y, atol=1e-5, rtol=1e-5)


def test_sequence_offsets_have_the_published_buckets() -> None:
    offsets = SequenceOffset(StructureSizes(pair_width=1))
    offsets.relative_attention_bias.weight = torch.nn.Parameter(torch.arange(64.0).unsqueeze(1))
    rows = offsets(300).squeeze(-1)[:, 0].tolist()
    columns = offsets(300).squeeze(-1)[0].tolist()
    assert rows[:16] == list(range(16))
    assert [rows[d] for d in (16, 17, 32, 64, 127, 128, 299)] == [16, 16, 21, 26, 31, 31, 31]
    assert columns[1:] == [value + 32 for value in rows[1:]]


def test_gradients_reach_positions_and_rotations() -> None:
    net, pose = small_net(), poses(1, 6)
    single, pair, _, _ = protein_inputs(6)
    positions, rotations = pose.positions.requires_grad_(), pose.rotations.requires_grad_()
    translation, rotation = net(Pose(positions, rotations), torch.tensor([10]), net.condition(single, pair))
    (translation * wave(torch.cos, 1.0, 1, 6, 3)).sum().add(rotation.sum()).backward()
    for values in (positions.grad, rotations.grad):
        assert values is not None and torch.isfinite(values).all() and values.abs().max() > 1e-4
