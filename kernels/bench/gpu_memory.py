"""Peak memory of our attention with its bias: inputs, outputs, all gradients and the bias itself, in one layer and a stack.

Bytes a pair-head are the whole peak over B H L², so rows and outputs, which grow with L and not L², count too.
"""

from __future__ import annotations

from functools import partial

from bench import gpu_declared as declared
from bench.gpu_attention import VARIANTS
from bench.gpu_measures import Found, Key, Value
from bench.gpu_problem import Problem, make_problem
from bench.gpu_timing import Bench, attempt


def run(bench: Bench) -> Found:
    """Values of all measures of the part."""
    for length in (length for length in declared.MEMORY_LENGTHS if length in bench.sizes.lengths):
        problem = make_problem(bench, bench.sizes.samples_of(length))
        for subject in declared.MEMORY_SUBJECTS:
            columns = list(declared.MEMORY_COLUMNS)
            found = attempt(columns, partial(peaks, problem, bench, subject))
            for column in columns:
                yield Key("memory", declared.case_of(length), subject, column), found[column]


def peaks(problem: Problem, bench: Bench, subject: str) -> list[Value]:
    """GB of one layer and of the stack, and the same in bytes a pair-head."""
    (build,) = VARIANTS[subject](problem, bench).values()
    gb = [
        bench.clock.peak_gb(lambda layers=layers: build(layers).computation.both)[0]  # type: ignore[misc]
        for layers in (1, bench.sizes.layers)
    ]
    return [*gb, *(1e9 * value / problem.pair_heads for value in gb)]
