"""The pair operators through the fused kernels of dig_kernels: table, generator, streamed attention, deferred bias gradient.

A padded batch is a packing of equally long samples with a key mask; samples of one system share its static block. The
model's convention that a site has no pair with itself (channels 0 on the diagonal) is kept by a static block whose
diagonal cancels the table's value there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from dig_kernels.attention import layer_attention, open_ledger
from dig_kernels.dense_attention import open_ledger as open_dense_ledger
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, pack_lengths, pitch_of
from dig_kernels.pair_bias import GivenScalar, pair_channels
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.batch import Context
from dig_scale.errors import UserError
from dig_scale.model.pair_bias import PairBias, PairDistances, PairList, spread
from dig_scale.model.pair_operators import Ledgers, PairOperators, gather_by_corners, sum_by_filters
from dig_scale.model.select import PairWidths, inverse_distances, pair_distances


@dataclass(frozen=True)
class FusedOperators:
    """Bias flat [H * pairs] of a packing, filters [B,M,N,N] over distance in 1/Å, sites [B,N,3]."""

    bias: Tensor
    filters: Tensor
    sites: Tensor
    packing: Packing
    key_mask: Tensor
    widths: PairWidths

    def open(self) -> Ledgers:
        """The deferred ledger of the bias, the dense one of the filters."""
        bias = open_ledger(
            self.bias,
            self.packing,
            layers=self.widths.layers,
            heads=self.widths.heads,
            width=self.widths.head_width,
            dtype=self.bias.dtype,
            key_mask=self.key_mask,
            backend=Backend.TRITON,
        )
        return bias, open_dense_ledger(self.filters)

    def attend(self, qkv: Tensor, heads: int, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        batch, n, width = qkv.shape
        q, k, v = qkv.to(self.bias.dtype).view(batch * n, 3, heads, width // (3 * heads)).unbind(1)
        out, ledger = layer_attention(q, k, v, ledgers[0])
        return out.reshape(batch, n, width // 3).to(qkv.dtype), (ledger, ledgers[1])

    def gather(self, keys: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        vectors, ledger = gather_by_corners(self.filters, self.sites, keys, ledgers[1])
        return vectors, (ledgers[0], ledger)

    def gather_vectors(self, values: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        vectors, ledger = sum_by_filters(self.filters, values, ledgers[1])
        return vectors, (ledgers[0], ledger)


def fused_geometry(
    pair_bias: PairBias, widths: PairWidths, positions: Tensor, context: Context, noise_std: Tensor
) -> tuple[PairOperators, Tensor]:
    """FusedOperators of a batch and its node feature [B, N, M]. See select.Build."""
    if pair_bias.grid is None:
        raise UserError("fused kernels need a radial table: set model.radial_knots > 0, or model.kernels = 'reference'")
    found = pair_distances(positions, context, noise_std)
    batch, n = positions.shape[:2]
    packing = _packing(batch, n, len(context.present), positions.device)
    mask = context.present.expand(batch, n).reshape(-1)
    u = GivenScalar(_every_row(pair_bias.scalar(found, context, noise_std), found.pairs))
    pieces = pair_bias.pieces()
    static = pair_bias.dense_static(found.pairs, context)
    without_self = static - torch.diag_embed(pieces[0, 0].unsqueeze(-1).expand(-1, n))
    heads, last = widths.heads, widths.heads + widths.filters
    among = torch.cat([pieces[..., :heads], pieces[..., last:]], dim=-1).contiguous()
    bias, node = pair_channels(
        among, pair_bias.grid, u, _flat(without_self[:, :heads]), packing, heads,
        key_mask=mask, dtype=widths.attention_dtype, backend=Backend.TRITON,
    )  # fmt: skip
    filters, _ = pair_channels(
        pieces[..., heads:last].contiguous(), pair_bias.grid, u, _flat(without_self[:, heads:last]), packing,
        widths.filters, backend=Backend.TRITON,
    )  # fmt: skip
    weights = _over_distance(filters, found, context, widths)
    among_present = static[:, last:].masked_fill(~context.present[:, None, None, :], 0.0).sum(-1).transpose(1, 2)
    node = (node - pieces[0, 0, last:]).view(batch, n, -1) + among_present
    return FusedOperators(bias, weights, found.sites, packing, mask, widths), node


@lru_cache(maxsize=64)
def _packing(batch: int, n: int, systems: int, device: torch.device) -> Packing:
    """Samples of n sites each, of one system or of one each."""
    return pack_lengths([n] * batch, device, system=[0] * batch if systems == 1 else None)


def _every_row(of_pairs: Tensor, pairs: PairList) -> Tensor:
    """Flat pair tensor [B * N * pitch] from values [B, P] of the pairs i < j; 0 on the diagonal and in the padding."""
    return _flat(spread(of_pairs.unsqueeze(-1), pairs))


def _flat(dense: Tensor) -> Tensor:
    """Flat blocks [B * C * N * pitch] of dense pair tensors [B, C, N, N] of one size."""
    n = dense.shape[-1]
    return pad(dense, (0, pitch_of(n) - n)).reshape(-1)


def _over_distance(flat: Tensor, found: PairDistances, context: Context, widths: PairWidths) -> Tensor:
    """Filter weights [B, M, N, N]: channels over distance, 0 for absent keys and on the diagonal."""
    batch, n = found.sites.shape[:2]
    channels = flat.view(batch, widths.filters, n, pitch_of(n))[..., :n]
    return channels * inverse_distances(found, ~context.present[:, None, None, :])
