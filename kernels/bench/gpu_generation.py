"""Making the pair bias, and summing Gaussians over neighbours, from positions: eager, compiled, and by table.

bias: positions -> distances -> u = gain d + shift by types -> Gaussians -> MLP -> bias [B, H, L, L] in the benchmark's
dtype. Eager evaluates all of it for every pair, its linear layers in that dtype; ours evaluates the MLP at the knots (that
time counts) and looks the pairs up. node: sum_j Gaussians(u_ij), [B, L, K] in fp32. Gradients of positions, gain, shift and
all radial parameters. The error is that of a few rows of the first sample against fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from bench import gpu_declared as declared
from bench.gpu_attention import largest_error, numbers
from bench.gpu_measures import Found, Key, Value, ratio
from bench.gpu_problem import U_STOP, Radial, make_geometry, make_radial
from bench.gpu_timing import Bench, Cache, Computation, attempt
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, pack_lengths, pitch_of
from dig_kernels.pair_bias import pair_channels
from dig_kernels.pair_source import PairGeometry
from dig_kernels.radial_table import KnotGrid, hermite_pieces
from dig_kernels.reference import distances, pair_scalar
from torch import Tensor

CHECKED_ROWS = 8


@dataclass(frozen=True)
class Task:
    """Samples of one length: geometry and radial function, all leaves with gradients."""

    batch: int
    length: int
    geometry: PairGeometry
    radial: Radial
    packing: Packing
    grid: KnotGrid
    dtype: torch.dtype

    @property
    def maps(self) -> list[Tensor]:
        """Leaves that both quantities depend on."""
        return [self.geometry.positions, self.geometry.gain, self.geometry.shift]


@dataclass(frozen=True)
class Made:
    """A way to make a quantity: the function, the leaves it depends on, and its rows of the first sample in plain order."""

    make: Callable[[Task], Tensor]
    leaves: Callable[[Task], Sequence[Tensor]]
    rows: Callable[[Task, Tensor], Tensor]


def make_task(bench: Bench, length: int) -> Task:
    """The task of the case called L=`length`."""
    lengths = bench.sizes.samples_of(length)
    geometry, radial = make_geometry(bench, lengths), make_radial(bench, bench.sizes.heads)
    places = [geometry.positions, geometry.gain, geometry.shift]
    positions, gain, shift = (tensor.clone().requires_grad_() for tensor in places)
    leaves = {field.name: getattr(radial, field.name).clone().requires_grad_() for field in fields(Radial)}
    return Task(
        len(lengths), lengths[0], PairGeometry(positions, geometry.types, gain, shift), Radial(**leaves),
        pack_lengths(lengths, bench.device), KnotGrid(0.0, U_STOP, bench.sizes.knots), bench.dtype,
    )  # fmt: skip


def pair_scalars(task: Task) -> Tensor:
    """u [B, L, L]."""
    x = task.geometry.positions.view(task.batch, task.length, 3)
    types = task.geometry.types.view(task.batch, task.length).long()
    return pair_scalar(distances(x, x), types, types, task.geometry.gain, task.geometry.shift)


def eager_bias(task: Task) -> Tensor:
    """Bias [B, H, L, L] from the formula; linear layers in the task's dtype where that is narrower than fp32."""
    u = pair_scalars(task)
    with torch.autocast(u.device.type, dtype=torch.bfloat16, enabled=task.dtype is torch.bfloat16):
        channels = task.radial.direct(u)
    return channels.permute(0, 3, 1, 2).to(task.dtype).contiguous()


def table_bias(task: Task) -> Tensor:
    """Bias flat [H * pairs] from a table built here."""
    pieces = hermite_pieces(*task.radial.channels(task.grid.positions(task.radial.centre)), task.grid)
    heads = pieces.shape[-1]
    bias, _ = pair_channels(
        pieces, task.grid, task.geometry, None, task.packing, heads, dtype=task.dtype, backend=Backend.TRITON
    )
    return bias


def eager_node(task: Task) -> Tensor:
    """Sums [B, L, K] from the formula."""
    z = (pair_scalars(task).unsqueeze(-1) - task.radial.centre) * torch.exp(-task.radial.log_width)
    return torch.exp(-0.5 * z * z).sum(2)


def table_node(task: Task) -> Tensor:
    """Sums [T, K] from a table built here."""
    pieces = hermite_pieces(*task.radial.gaussians(task.grid.positions(task.radial.centre)), task.grid)
    _, node = pair_channels(pieces, task.grid, task.geometry, None, task.packing, 0, backend=Backend.TRITON)
    return node


def dense_rows(task: Task, bias: Tensor) -> Tensor:
    """[H, rows, L] of a dense bias."""
    return bias[0, :, :CHECKED_ROWS]


def flat_rows(task: Task, bias: Tensor) -> Tensor:
    """[H, rows, L] of a flat bias."""
    heads, length, pitch = len(task.radial.out), task.length, pitch_of(task.length)
    return bias[: heads * length * pitch].view(heads, length, pitch)[:, :CHECKED_ROWS, :length]


def node_rows(task: Task, node: Tensor) -> Tensor:
    """[rows, K]."""
    return node.view(task.batch, task.length, -1)[0, :CHECKED_ROWS]


def _all_leaves(task: Task) -> list[Tensor]:
    return [*task.maps, *task.radial.leaves]


def _gaussian_leaves(task: Task) -> list[Tensor]:
    return [*task.maps, task.radial.centre, task.radial.log_width]


def makers(part: str, bench: Bench) -> Mapping[str, Made]:
    """The ways to make the quantity of a part, by subject."""
    if part == "bias":
        return {
            declared.GENERATED: Made(table_bias, _all_leaves, flat_rows),
            declared.EAGER: Made(eager_bias, _all_leaves, dense_rows),
            declared.COMPILED: Made(bench.compiled(eager_bias), _all_leaves, dense_rows),
        }
    return {
        declared.GENERATED: Made(table_node, _gaussian_leaves, node_rows),
        declared.EAGER: Made(eager_node, _gaussian_leaves, node_rows),
        declared.COMPILED: Made(bench.compiled(eager_node), _gaussian_leaves, node_rows),
    }


def run_bias(bench: Bench) -> Found:
    """Values of the bias part."""
    return _run("bias", bench)


def run_node(bench: Bench) -> Found:
    """Values of the node part."""
    return _run("node", bench)


def _run(part: str, bench: Bench) -> Found:
    for length in bench.sizes.lengths:
        case, task = declared.case_of(length), make_task(bench, length)
        values: dict[Key, Value] = {}
        for subject, made in makers(part, bench).items():
            found = maker_columns(task, bench, made, exact_rows(part, task))
            values |= {Key(part, case, subject, column): value for column, value in found.items()}
        for name in (declared.EAGER, declared.COMPILED):
            for column in (declared.FORWARD, declared.BOTH):
                above, below = (Key(part, case, subject, column) for subject in (name, declared.GENERATED))
                values[Key(part, case, declared.over_ours(name), column)] = ratio(values, above, below)
        yield from values.items()


def exact_rows(part: str, task: Task) -> Tensor:
    """The checked rows in fp64."""
    with torch.no_grad():
        positions = task.geometry.positions[: task.length].double()
        types, rows = task.geometry.types[: task.length].long(), slice(CHECKED_ROWS)
        maps = (task.geometry.gain.double(), task.geometry.shift.double())
        u = pair_scalar(distances(positions[rows], positions), types[rows], types, *maps)
        radial = Radial(*(tensor.double() for tensor in task.radial.leaves))
        return radial.direct(u).permute(2, 0, 1) if part == "bias" else radial.gaussians(u)[0].sum(1)


def maker_columns(task: Task, bench: Bench, made: Made, exact: Tensor) -> dict[str, Value]:
    """All columns of one subject."""
    timed = [
        declared.ERROR, *declared.spread(declared.FORWARD), declared.FORWARD_WARM,
        *declared.spread(declared.BOTH), declared.BOTH_WARM, declared.BOTH_HOST,
    ]  # fmt: skip
    return {
        **attempt(timed, partial(_timed, task, bench, made, exact)),
        **attempt([declared.PEAK], lambda: [bench.clock.peak_gb(lambda: _computation(task, made).both)[0]]),
    }


def _timed(task: Task, bench: Bench, made: Made, exact: Tensor) -> list[Value]:
    work = _computation(task, made)
    (out,) = work.forward()
    error = largest_error(made.rows(task, out), exact)
    forward, forward_warm = (bench.clock.time(work.forward, cache) for cache in (Cache.COLD, Cache.WARM))
    both, both_warm = (bench.clock.time(work.both, cache) for cache in (Cache.COLD, Cache.WARM))
    return [error, *numbers(forward), forward_warm.median, *numbers(both), both_warm.median, both.host]


def _computation(task: Task, made: Made) -> Computation:
    with torch.no_grad():
        like = made.make(task)
    generator = torch.Generator(like.device).manual_seed(3)
    seed = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return Computation(lambda: [made.make(task)], made.leaves(task), [seed])
