"""The model's heavy operators, three times the same mathematics: from the formula, for processors, as fused kernels.

Each set knows the pair tensors of one batch: attention bias and filter weights, shared by all blocks, so that only the sum
over blocks of their gradients is wanted; a *ledger* (see dig_kernels.dense_attention, dig_kernels.attention) travels with
the tokens from block to block and carries it. Knows tensors; no parameters live here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from dig_kernels.dense_attention import SMALL, dense_attention, open_ledger, pair_sum
from torch import Tensor

Ledgers = tuple[Any, Tensor]
"""Of the bias (what it is, is the implementation's affair) and of the filters."""


class PairOperators(Protocol):
    """Attention with the batch's bias, and sums over pair directions with the batch's filters."""

    def open(self) -> Ledgers:
        """The ledgers that the first block takes."""
        ...

    def attend(self, qkv: Tensor, heads: int, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """softmax(q k^T / sqrt(d) + bias) v [B, N, D] from qkv [B, N, 3 D]."""
        ...

    def gather(self, keys: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """V_im = sum_j filters_mij keys_jm (r_i - r_j), [B, 3, M, N] component first, from keys [B, N, M]."""
        ...

    def gather_vectors(self, values: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """sum_j filters_mij values_jm, [B, 3, M, N], from vectors [B, N, M, 3]."""
        ...


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, d] from [B, N, 3 D]."""
    batch, n, width = qkv.shape
    q, k, v = qkv.view(batch, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def join_heads(out: Tensor) -> Tensor:
    """[B, N, D] from [B, H, N, d]."""
    return out.transpose(1, 2).flatten(2)


def attention_by_formula(qkv: Tensor, heads: int, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v [B, N, D] from qkv [B, N, 3 D]."""
    q, k, v = split_heads(qkv, heads)
    weights = torch.softmax(q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2) + bias, dim=-1)
    return join_heads(weights.to(v.dtype) @ v)


@dataclass(frozen=True)
class ReferenceOperators:
    """From the formulas; bias [B,H,N,N], filters [B,M,N,N], sites [B,N,3]. Differentiable any number of times."""

    bias: Tensor
    filters: Tensor
    sites: Tensor

    def open(self) -> Ledgers:
        """Nothing to carry: autograd sums the gradients."""
        return self.bias.new_zeros(()), self.filters.new_zeros(())

    def attend(self, qkv: Tensor, heads: int, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        return attention_by_formula(qkv, heads, self.bias), ledgers

    def gather(self, keys: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        with torch.autocast(keys.device.type, enabled=False):
            weights = self.filters * keys.to(self.sites.dtype).transpose(1, 2).unsqueeze(2)
            offsets = self.sites.unsqueeze(2) - self.sites.unsqueeze(1)
            return torch.einsum("bmij,bijc->bcmi", weights, offsets), ledgers

    def gather_vectors(self, values: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        with torch.autocast(values.device.type, enabled=False):
            return torch.einsum("bmij,bjmc->bcmi", self.filters, values.to(self.filters.dtype)), ledgers


@dataclass(frozen=True)
class DenseOperators:
    """For processors: nothing of size N² is made per block, and its gradient is added up in place."""

    bias: Tensor
    filters: Tensor
    sites: Tensor

    def open(self) -> Ledgers:
        """Ledgers of the two pair tensors; empty ones for small samples, which need none."""
        if self.sites.shape[1] <= SMALL:
            return self.bias.new_zeros(()), self.filters.new_zeros(())
        return open_ledger(self.bias), open_ledger(self.filters)

    def attend(self, qkv: Tensor, heads: int, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        out, ledger = dense_attention(*split_heads(qkv, heads), self.bias, ledgers[0])
        return join_heads(out), (ledger, ledgers[1])

    def gather(self, keys: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        if self.sites.shape[1] <= SMALL:
            return self._gather_small(keys), ledgers
        vectors, ledger = gather_by_corners(self.filters, self.sites, keys, ledgers[1])
        return vectors, (ledgers[0], ledger)

    def gather_vectors(self, values: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        if self.sites.shape[1] <= SMALL:
            with torch.autocast(values.device.type, enabled=False):
                rows = values.to(self.filters.dtype).transpose(1, 2)
                return (self.filters @ rows).permute(0, 3, 1, 2), ledgers
        vectors, ledger = sum_by_filters(self.filters, values, ledgers[1])
        return vectors, (ledgers[0], ledger)

    def _gather_small(self, keys: Tensor) -> Tensor:
        with torch.autocast(keys.device.type, enabled=False):
            sites = self.sites.transpose(1, 2)
            weights = self.filters * keys.to(sites.dtype).transpose(1, 2).unsqueeze(2)
            corners = torch.cat([sites, torch.ones_like(sites[:, :1])], dim=1)
            summed = (corners @ weights.flatten(1, 2).transpose(1, 2)).unflatten(2, weights.shape[1:3])
            return summed[:, 3:] * sites.unsqueeze(2) - summed[:, :3]


def gather_by_corners(filters: Tensor, sites: Tensor, keys: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor]:
    """V [B, 3, M, N] = r_i sum_j w_ij - sum_j w_ij r_j as one product of each filter with four columns, and the ledger.

    In the precision of the sites even under autocast: the two sums cancel.
    """
    with torch.autocast(keys.device.type, enabled=False):
        corners = torch.cat([sites, torch.ones_like(sites[..., :1])], dim=-1)
        rows = keys.to(sites.dtype).transpose(1, 2).unsqueeze(-1) * corners.unsqueeze(1)
        summed, ledger = pair_sum(filters, rows, ledger)
        return (summed[..., 3:] * sites.unsqueeze(1) - summed[..., :3]).permute(0, 3, 1, 2), ledger


def sum_by_filters(filters: Tensor, values: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j filters_mij values_jm [B, 3, M, N] from vectors [B, N, M, 3], and the ledger."""
    with torch.autocast(values.device.type, enabled=False):
        summed, ledger = pair_sum(filters, values.to(filters.dtype).transpose(1, 2).contiguous(), ledger)
        return summed.permute(0, 3, 1, 2), ledger


@dataclass(frozen=True)
class ImageOperators:
    """With periodic images folded in: bias [B,H,N,N]; filters w [B,M,N,N]; arms [B,M,3N,N], sums of w (r_i - r_j).

    tensors [B,N,M,6] are the sums over neighbours of w u uᵀ that a strain of the cell is read from. `dense` says whether
    attention is dig_kernels' for processors, which lacks forward-mode derivatives, or from the formula.
    """

    bias: Tensor
    filters: Tensor
    arms: Tensor
    tensors: Tensor
    dense: bool

    def open(self) -> Ledgers:
        """The bias's ledger where samples are large; the filters need none."""
        shared = self.dense and self.bias.shape[-1] > SMALL
        return open_ledger(self.bias) if shared else self.bias.new_zeros(()), self.filters.new_zeros(())

    def attend(self, qkv: Tensor, heads: int, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        if not self.dense:
            return attention_by_formula(qkv, heads, self.bias), ledgers
        out, ledger = dense_attention(*split_heads(qkv, heads), self.bias.to(qkv.dtype), ledgers[0])
        return join_heads(out), (ledger, ledgers[1])

    def gather(self, keys: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        with torch.autocast(keys.device.type, enabled=False):
            columns = keys.to(self.arms.dtype).transpose(1, 2).unsqueeze(-1)
            return (self.arms @ columns).squeeze(-1).unflatten(2, (3, -1)).transpose(1, 2), ledgers

    def gather_vectors(self, values: Tensor, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """See PairOperators."""
        with torch.autocast(values.device.type, enabled=False):
            rows = values.to(self.filters.dtype).transpose(1, 2)
            return (self.filters @ rows).permute(0, 3, 1, 2), ledgers
