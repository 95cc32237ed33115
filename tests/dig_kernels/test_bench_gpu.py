"""The GPU benchmark without a GPU: its table stands, its code runs, and it publishes neither a wrong nor a made-up number."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from bench import bench_gpu, gpu_attention, gpu_competitors, gpu_declared, gpu_ours
from bench.gpu_declared import PARTS
from bench.gpu_measures import Bar, Key, Measure, Value, ratio, row_of, smallest
from bench.gpu_problem import make_problem, ragged_lengths
from bench.gpu_setup import Layer, UnavailableError
from bench.gpu_timing import REHEARSAL, Bench, Sizes, rehearsal_bench
from dig_kernels.attention import biased_attention
from dig_kernels.dispatch import Backend
from torch import Tensor

from benchmarks.rows import NOT_MEASURED

LENGTHS = (128, 256, 512, 1024, 2048)
KEY = Key("attention", "L=512", "ours", "forward")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return rehearsal_bench(REHEARSAL)


def declared_measures(lengths: Sequence[int]) -> list[Measure]:
    return [measure for measures, _ in PARTS.values() for measure in measures(lengths)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_row_says_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"--json": tmp_path / "rows.json", "--csv": tmp_path / "rows.csv"}
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *(str(word) for pair in files.items() for word in pair)])
    bench_gpu.main()
    rows = json.loads(files["--json"].read_text())["rows"]
    assert {row["value"] for row in rows} == {NOT_MEASURED}
    assert {row["met"] for row in rows} == {None}
    measures = declared_measures(LENGTHS)
    assert [bool(row["bar"]) for row in rows] == [measure.bar is not None for measure in measures]
    assert len(list(csv.DictReader(files["--csv"].open()))) == len(measures)


def test_bars_are_those_that_were_promised() -> None:
    measures = declared_measures(LENGTHS)
    bars = {measure.key: measure.bar for measure in measures if measure.bar is not None}
    assert len({measure.key for measure in measures}) == len(measures)
    attention = partial(Key, "attention", "L=512")
    assert bars[attention("best of ours", "forward")] == Bar("<=", 0.32)
    assert bars[attention("best of ours", "stack, a layer")] == Bar("<=", 1.1)
    over = {"eager": 6.0, "SDPA + bias": 2.0, "FlexAttention": 3.0, "DS4Sci Evoformer": 2.0}
    for name, limit in over.items():
        assert bars[attention(f"{name} over ours", "stack, a layer")] == Bar(">=", limit)
    assert bars[Key("bias", "L=512", "eager over ours", "fwd+bwd")] == Bar(">=", 20)
    assert bars[Key("memory", "L=512", "ours stream", "one layer, bytes a pair-head")] == Bar("<=", 6)
    assert bars[Key("memory", "L=2048", "ours table", "one layer")] == Bar("<=", 0.5)
    steps = {128: 2.0, 512: 3.5, 2048: 5.0}
    for length, limit in steps.items():
        assert bars[Key("step", f"12x768, L={length}", "reference over ours", "step")] == Bar(">=", limit)
    deep = "24 layers, FFN 3072"
    shares = {("12x768", 128): 38.0, ("12x768", 512): 27.0, (deep, 128): 45.0, (deep, 512): 35.0}
    for (model, length), limit in shares.items():
        assert bars[Key("step", f"{model}, L={length}", "best of ours", "MFU")] == Bar(">=", limit)


@pytest.mark.parametrize(
    ("bar", "value", "met"),
    [
        (Bar("<=", 0.32), 0.32, True),
        (Bar("<=", 0.32), 0.33, False),
        (Bar(">=", 2.0), 2.0, True),
        (Bar(">=", 2.0), 1.9, False),
        (Bar(">=", 2.0), "out of memory", None),
        (None, 1.0, None),
    ],
)
def test_only_a_number_meets_or_misses_a_bar(bar: Bar | None, value: Value, met: bool | None) -> None:
    row = row_of(Measure(KEY, "ms", bar), {KEY: value})
    assert (row.value, row.met) == (value, met)


def test_a_comparison_with_something_that_failed_says_what_failed() -> None:
    other = KEY._replace(subject="eager")
    assert ratio({KEY: 0.5, other: 3.0}, other, KEY) == 6.0
    assert ratio({KEY: 0.5, other: "out of memory"}, other, KEY) == "not measured: eager: out of memory"
    assert ratio({KEY: 0.5}, other, KEY) == NOT_MEASURED
    assert smallest({KEY: "out of memory", other: 3.0}, [KEY, other]) == other


def test_ragged_lengths_fill_the_sites_and_differ() -> None:
    lengths = ragged_lengths(Sizes())
    assert sum(lengths) == 16_384 and len(set(lengths)) > len(lengths) // 2 and max(lengths) > 3 * min(lengths)


@pytest.mark.parametrize("part", ["memory", "node", "bias"])
def test_rehearsal_gives_every_declared_measure_a_value(part: str, bench: Bench) -> None:
    values = dict(bench_gpu.runner(part)(bench))
    assert values.keys() == {measure.key for measure in PARTS[part][0](REHEARSAL.lengths)}
    ours = {key: value for key, value in values.items() if key.subject.startswith("ours")}
    assert ours and not [value for value in ours.values() if isinstance(value, str)]


def test_a_contender_that_cannot_run_is_published_with_its_reason(bench: Bench) -> None:
    def absent(problem: object, bench: Bench) -> dict[str, gpu_attention.Build]:
        raise UnavailableError("not installed")

    columns = gpu_attention.contender_columns(make_problem(bench, [16]), bench, absent)
    assert columns == dict.fromkeys(gpu_declared.ATTENTION_COLUMNS, "UnavailableError: not installed")


def test_a_wrong_bias_gradient_is_published_and_not_timed(bench: Bench) -> None:
    problem = make_problem(bench, [16])

    def flipped(_: object, bias: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        q, k, v = layers[0]
        constant = bias.detach()
        return [biased_attention(q, k, v, 2 * constant - bias, problem.packing, backend=Backend.REFERENCE)]

    right = {"packed": partial(gpu_ours.packed_setup, problem, plain_attention)}
    wrong = {"packed": partial(gpu_ours.packed_setup, problem, flipped)}
    assert isinstance(gpu_attention.contender_columns(problem, bench, lambda *_: right)["forward"], float)
    text = gpu_attention.contender_columns(problem, bench, lambda *_: wrong)["forward"]
    assert isinstance(text, str) and "WrongResultError" in text


def plain_attention(problem: gpu_attention.Problem, bias: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """Every layer through the reference."""
    return [biased_attention(q, k, v, bias, problem.packing, backend=Backend.REFERENCE) for q, k, v in layers]


def evoformer(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor | None]) -> Tensor:
    """What DeepSpeed documents: [B, N, L, H, d], mask [B, N, 1, 1, L], bias [B, 1, H, L, L], scaled by its own width."""
    batch, _, length, heads, width = q.shape
    mask, bias = biases
    assert mask is None and bias is not None and bias.shape == (batch, 1, heads, length, length)
    rows = [row.transpose(2, 3) for row in (q, k, v)]
    return (torch.softmax(width**-0.5 * rows[0] @ rows[1].mT + bias, -1) @ rows[2]).transpose(2, 3)


def triangle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """What cuEquivariance documents: [B, N, H, L, d], bias [B, 1, H, L, L]."""
    assert bias.shape == (len(q), 1, q.shape[2], q.shape[3], q.shape[3])
    return torch.softmax(scale * q @ k.mT + bias, -1) @ v


@pytest.mark.parametrize("lengths", [[16, 16], [13, 5]])
def test_libraries_get_rows_and_bias_as_they_document_them(lengths: list[int], bench: Bench) -> None:
    problem = make_problem(bench, lengths)
    variants = {
        **gpu_competitors.evoformer_variants(problem, evoformer),
        **gpu_competitors.triangle_variants(problem, triangle),
        **gpu_competitors.eager_variants(problem, bench),
        **gpu_competitors.sdpa_variants(problem, bench),
    }
    for name, build in variants.items():
        assert max(gpu_attention.errors(build(1))) < 1e-4, name
