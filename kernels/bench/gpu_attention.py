"""Attention with a shared, learned pair bias: every contender, one layer and a stack that shares the bias.

Milliseconds of a layer, forward, and forward and backward with the gradient of the bias; the same in a stack of layers
that share the bias, its gradient summed over them, per layer; peak memory; errors against fp64 on the first sample's first
heads; percent of the cost model's floor (a bound computed from the architecture, no measurement). Of a contender's
variants the one with the fastest correct backward is measured in full. Columns without "warm" are taken with a cold
cache; the bars on forward and backward are judged on the stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from bench import gpu_competitors as competitors
from bench import gpu_declared as declared
from bench import gpu_ours as ours
from bench.gpu_measures import Found, Key, Value, Values, ratio, smallest
from bench.gpu_problem import Problem, make_problem, ragged_lengths, solve
from bench.gpu_setup import Build, Setup, Variants
from bench.gpu_timing import Bench, Cache, Timing, Work, attempt, failure_text, release_memory
from torch import Tensor

from benchmarks.rows import NOT_MEASURED

FLOOR_FORWARD, FLOOR_BOTH = 0.74e-9, 1.9e-9
"""Milliseconds a pair and head: the cost model's bounds on an H200, without and with the backward."""
WRONG = 0.1
"""A variant whose output or gradients are off by more than this part of their size is not timed."""

VARIANTS: Mapping[str, Variants] = {
    declared.STREAM: ours.stream_variants,
    declared.DEFER: ours.defer_variants,
    declared.TABLE: ours.table_variants,
    declared.SMALL_BLOCK: ours.small_block_variants,
    declared.CUDA_TABLE: ours.cuda_table_variants,
    declared.EAGER: competitors.eager_variants,
    declared.COMPILED: competitors.compiled_variants,
    declared.SDPA: competitors.sdpa_variants,
    declared.FLEX_DENSE: competitors.flex_dense_variants,
    declared.FLEX_TABLE: competitors.flex_table_variants,
    declared.DS4SCI: competitors.ds4sci_variants,
    declared.CUEQUIVARIANCE: competitors.cuequivariance_variants,
}


TRIED = (declared.BOTH_WARM, declared.BOTH_HOST, declared.ERROR, declared.GRADIENT_ERROR)
"""Columns that every variant is tried for."""


class WrongResultError(RuntimeError):
    """A contender computes something else."""


def run(bench: Bench) -> Found:
    """Values of all measures of the part, case by case."""
    cases = {declared.case_of(length): bench.sizes.samples_of(length) for length in bench.sizes.lengths}
    cases[declared.RAGGED] = ragged_lengths(bench.sizes)
    for case, lengths in cases.items():
        problem = make_problem(bench, lengths)
        values: dict[Key, Value] = {}
        for subject in declared.CONTENDERS:
            for column, value in contender_columns(problem, bench, VARIANTS[subject]).items():
                values[Key("attention", case, subject, column)] = value
                yield Key("attention", case, subject, column), value
        added = attempt([declared.ADDING], partial(adding_gradients, problem, bench))
        yield Key("attention", case, declared.AUTOGRAD, declared.ADDING), added[declared.ADDING]
        yield from compare(values, case).items()


def contender_columns(problem: Problem, bench: Bench, variants: Variants) -> dict[str, Value]:
    """All columns of one contender."""
    try:
        builds = variants(problem, bench)
    except Exception as error:  # not installed, not built, not for this shape: the table says which
        return dict.fromkeys(declared.ATTENTION_COLUMNS, failure_text(error))
    tried = {name: attempt(TRIED, partial(try_variant, build, bench)) for name, build in builds.items()}
    first = {name: columns[declared.BOTH_WARM] for name, columns in tried.items()}
    text = "; ".join(f"{name}: {v if isinstance(v, str) else f'{v:.4g} ms'}" for name, v in first.items())
    timed = {name: value for name, value in first.items() if not isinstance(value, str)}
    if not timed:
        return dict.fromkeys(declared.ATTENTION_COLUMNS, text)
    best = min(timed, key=lambda name: timed[name])
    return {**tried[best], **measured_columns(problem, bench, builds[best]), declared.VARIANTS: text}


def try_variant(build: Build, bench: Bench) -> list[Value]:
    """The columns TRIED of one layer; raises WrongResultError where it computes something else."""
    setup = build(1)
    found = errors(setup)
    if not all(error < WRONG for error in found):  # NaN too
        raise WrongResultError(f"errors {found[0]:.2g} of the output, {found[1]:.2g} of gradients")
    timing = bench.clock.time(setup.computation.both, Cache.WARM)
    return [timing.median, timing.host, *found]


def errors(setup: Setup) -> tuple[float, float]:
    """Largest error of the output, and of any gradient relative to its largest element, against fp64 on the slice."""
    computation = setup.computation
    out, grads = setup.cut(computation.forward()[0]), computation.both()
    rows = [setup.cut(tensor) for tensor in (*setup.layers[0], setup.seeds[0])]
    exact = solve(rows, setup.bias(), setup.scale)
    found = [(setup.cut(grad), wanted) for grad, wanted in zip(grads[:3], exact.rows, strict=True)]
    if setup.cut_bias is not None:
        found.append((setup.cut_bias(grads[3]), exact.bias))
    return largest_error(out, exact.out), max(largest_error(g, w) / float(w.abs().max()) for g, w in found)


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted|; infinite where something is not finite."""
    error = float((found.double() - wanted).abs().max())
    return error if math.isfinite(error) else math.inf


def measured_columns(problem: Problem, bench: Bench, build: Build) -> dict[str, Value]:
    """Columns of the chosen variant; each group fails on its own."""
    one_layer = [
        *declared.spread(declared.FORWARD), declared.FORWARD_WARM, *declared.spread(declared.BOTH),
        declared.FLOOR_FORWARD, declared.FLOOR_BOTH,
    ]  # fmt: skip
    return {
        **attempt(one_layer, partial(_one_layer, problem, bench, build)),
        **attempt([declared.PEAK], lambda: [bench.clock.peak_gb(partial(_both_of, build, 1))[0]]),
        **attempt([declared.STACK_PEAK, *declared.spread(declared.STACK)], partial(_stack, bench, build)),
    }


def _both_of(build: Build, layers: int) -> Work:
    return build(layers).computation.both


def _one_layer(problem: Problem, bench: Bench, build: Build) -> list[Value]:
    work = build(1).computation
    forward, forward_warm = (bench.clock.time(work.forward, cache) for cache in (Cache.COLD, Cache.WARM))
    both = bench.clock.time(work.both, Cache.COLD)
    floors = [
        100 * problem.pair_heads * floor / timing.median
        for floor, timing in ((FLOOR_FORWARD, forward), (FLOOR_BOTH, both))
    ]
    return [*numbers(forward), forward_warm.median, *numbers(both), *floors]


def _stack(bench: Bench, build: Build) -> list[Value]:
    layers = bench.sizes.layers
    peak, work = bench.clock.peak_gb(partial(_both_of, build, layers))
    return [peak, *(value / layers for value in numbers(bench.clock.time(work, Cache.COLD)))]


def numbers(timing: Timing) -> list[float]:
    """Median and percentiles, in the order of declared.spread."""
    return [timing.median, timing.p10, timing.p90]


def adding_gradients(problem: Problem, bench: Bench) -> list[Value]:
    """What autograd does for every further layer whose gradient of the bias is dense: add it to the sum so far."""
    shape = problem.heads * problem.packing.pairs
    first, second = (torch.ones(shape, dtype=problem.dtype, device=bench.device) for _ in range(2))
    return [bench.clock.time(lambda: first + second, Cache.COLD).median]


def compare(values: Values, case: str) -> dict[Key, Value]:
    """Best of ours, and the competitors beside it."""
    found: dict[Key, Value] = {}
    for column in (declared.FORWARD, declared.STACK, declared.BOTH):
        subjects = (*declared.OURS, declared.CUDA_TABLE) if column == declared.FORWARD else declared.OURS
        best = smallest(values, _keys(case, subjects, column))
        if column != declared.BOTH:
            found[Key("attention", case, declared.BEST, column)] = values[best]
            found[Key("attention", case, declared.BEST, declared.mode_of(column))] = named_best(values, best)
        for name, (theirs, _, _) in declared.COMPARED.items():
            rival = smallest(values, _keys(case, theirs, column))
            found[Key("attention", case, declared.over_ours(name), column)] = ratio(values, rival, best)
    release_memory()
    return found


def named_best(values: Values, best: Key) -> str:
    """Which subject is the best, if any was measured."""
    return NOT_MEASURED if isinstance(values[best], str) else best.subject


def _keys(case: str, subjects: Sequence[str], column: str) -> list[Key]:
    return [Key("attention", case, subject, column) for subject in subjects]
