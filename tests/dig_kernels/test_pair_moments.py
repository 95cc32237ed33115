"""Segment moments: right sums for every split into runs and chunks, the same bits on every repetition."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dig_kernels import pair_moments


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_moments, "LAUNCH", pair_moments.MomentsLaunch(chunk=16, tile=32, channels=4, warps=1))


def exact(keys: Tensor, f: Tensor, rows: Tensor, row_index: Tensor | None, segments: int, moments: int) -> Tensor:
    """The same sums by the definition, in fp64."""
    out = torch.zeros(segments, moments, rows.shape[1], dtype=torch.float64)
    for element, key in enumerate(keys.tolist()):
        row = int(row_index[element]) if row_index is not None else element
        if key < segments and row >= 0:
            for m in range(moments):
                out[key, m] += rows[row].double() * float(f[element]) ** m
    return out


def fused(
    module: ModuleType | SimpleNamespace,
    keys: Tensor,
    f: Tensor,
    rows: Tensor,
    row_index: Tensor | None,
    segments: int,
    moments: int,
) -> Tensor:
    by_key = module.sort_segments(keys.to(module.key_dtype(segments)), segments)
    return module.segment_moments(by_key, f, rows, row_index, moments)


def drawn(n: int, segments: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    keys = torch.randint(0, segments + 1, (n,), generator=generator)
    return keys, torch.rand(n, generator=generator), torch.randn(n, channels, generator=generator)


@pytest.mark.parametrize(("n", "segments", "channels", "moments"), [(101, 5, 6, 4), (40, 37, 1, 2), (17, 3, 4, 1)])
def test_sums_match_the_definition(n: int, segments: int, channels: int, moments: int) -> None:
    keys, f, rows = drawn(n, segments, channels)
    found = fused(pair_moments, keys, f, rows, None, segments, moments)
    assert torch.allclose(found.double(), exact(keys, f, rows, None, segments, moments), atol=1e-5)


def test_one_segment_may_hold_every_element() -> None:
    _, f, rows = drawn(150, 4, 3)
    keys = torch.full((150,), 2)
    found = fused(pair_moments, keys, f, rows, None, 4, 4)
    assert torch.allclose(found.double(), exact(keys, f, rows, None, 4, 4), atol=1e-4)
    assert not found[[0, 1, 3]].any()


def test_rows_may_be_shared_by_index_and_negative_indices_have_none() -> None:
    keys, f, _ = drawn(60, 4, 3)
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    index = torch.randint(-1, 5, (60,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    found = fused(pair_moments, keys, f, rows, index, 4, 4)
    assert torch.allclose(found.double(), exact(keys, f, rows, index, 4, 4), atol=1e-5)


def test_rows_in_bf16_are_summed_in_fp32() -> None:
    keys, f, rows = drawn(60, 2, 3)
    rows = rows.bfloat16()
    assert torch.allclose(
        fused(pair_moments, keys, f, rows, None, 2, 2).double(), exact(keys, f, rows, None, 2, 2), atol=1e-5
    )


def test_repetition_gives_the_same_bits() -> None:
    keys, f, rows = drawn(101, 3, 4)
    assert torch.equal(fused(pair_moments, keys, f, rows, None, 3, 4), fused(pair_moments, keys, f, rows, None, 3, 4))


def test_no_element_gives_zeros() -> None:
    keys, f, rows = drawn(0, 3, 4)
    assert torch.equal(fused(pair_moments, keys, f, rows, None, 3, 4), torch.zeros(3, 4, 4))


def test_five_moments_are_refused() -> None:
    keys, f, rows = drawn(8, 3, 4)
    with pytest.raises(ValueError, match="moments is 5"):
        fused(pair_moments, keys, f, rows, None, 3, 5)


@pytest.mark.parametrize(
    ("expression", "mutated"),
    [
        ("sum0 += value", "sum0 -= value"),
        ("value = value * fraction", "value = -value * fraction"),
        ("total += tl.load", "total -= tl.load"),
    ],
)
def test_a_flipped_sign_is_caught(expression: str, mutated: str, tmp_path: Path) -> None:
    source = Path(str(pair_moments.__file__)).read_text()
    assert expression in source
    path = tmp_path / "mutated_moments.py"
    path.write_text(source.replace(expression, mutated).replace("chunk: int = 1024", "chunk: int = 16"))
    namespace = {"__name__": pair_moments.__name__}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    module = SimpleNamespace(**namespace)
    keys, f, rows = drawn(30, 3, 2)
    assert not torch.allclose(
        fused(module, keys, f, rows, None, 3, 4).double(), exact(keys, f, rows, None, 3, 4), atol=1e-2
    )
