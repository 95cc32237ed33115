"""Whole training steps of two models, our kernels beside the reference form of the same model.

A step is forward, loss, backward and AdamW in bf16 autocast, timed host included. Where a batch does not fit in memory it
is taken in the fewest equal micro-batches that do. FLOP are those of dig_scale.training.metrics: 6 P N + 12 layers N² D a
sample of N sites, P the parameters that multiply every site's token, D the width; bias and geometric filters are left out.
MFU is that rate over the data sheet's dense bf16 peak; beside it stands the same rate over a matrix product's measured here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from bench import gpu_declared as declared
from bench.gpu_attention import named_best
from bench.gpu_measures import Found, Key, Value, Values, ratio, smallest
from bench.gpu_timing import Bench, Cache, Work, attempt, failure_text, release_memory

if TYPE_CHECKING:
    from bench.gpu_training import Training

PRODUCT = 8192
"""Rows and columns of the matrix product."""


def run(bench: Bench) -> Found:
    """Values of all measures of the part."""
    product = Key("step", declared.DEVICE, declared.PRODUCT, declared.RATE)
    rate = attempt([declared.RATE], partial(product_rate, bench))[declared.RATE]
    yield product, rate
    try:
        from bench.gpu_training import training_for
    except ImportError as error:  # the kernels alone are installed
        for measure in declared.step_measures(bench.sizes.lengths)[1:]:
            yield measure.key, failure_text(error)
        return
    for model, length in declared.step_cases(bench.sizes.lengths):
        case, values = declared.step_case(model, length), {product: rate}
        for subject in declared.TRAINED:
            training = training_for(bench, model, length, subject)
            for column, value in step_columns(bench, training).items():
                values[Key("step", case, subject, column)] = value
                yield Key("step", case, subject, column), value
        yield from compare(values, case, product).items()


def product_rate(bench: Bench) -> list[Value]:
    """TFLOP/s of a square matrix product of random numbers."""
    n = PRODUCT if bench.on_gpu else 32
    a, b = (torch.randn(n, n, device=bench.device).to(bench.dtype) for _ in range(2))
    return [2 * n**3 / bench.clock.time(lambda: a @ b, Cache.WARM).median / 1e9]


def step_columns(bench: Bench, training: Training) -> dict[str, Value]:
    """All columns of one subject."""
    return attempt(list(declared.STEP_COLUMNS), partial(_step, bench, training))


def _step(bench: Bench, training: Training) -> list[Value]:
    fitting, peak, work = fewest_micro_batches(bench, training)
    timing = bench.clock.time_with_host(work)
    rate = fitting.flops / timing.median / 1e9
    mfu = 100 * rate * 1e12 / fitting.peak_flops
    return [timing.median, timing.p10, timing.p90, peak, float(fitting.micro_batches), rate, mfu]


def fewest_micro_batches(bench: Bench, training: Training) -> tuple[Training, float, Work]:
    """The training in as many micro-batches as memory asks for, its peak in GB and its step.

    Raises OutOfMemoryError where one sample is too much.
    """
    count = 1
    while count <= training.batch:
        tried = replace(training, micro_batches=count)
        found = _fitting(bench, tried)
        if found is not None:
            return tried, *found
        release_memory()
        count *= 2
    raise torch.OutOfMemoryError("a micro-batch of one sample does not fit")


def _fitting(bench: Bench, training: Training) -> tuple[float, Work] | None:
    try:
        return bench.clock.peak_gb(training.build_step)
    except torch.OutOfMemoryError:
        return None


def compare(values: Values, case: str, product: Key) -> dict[Key, Value]:
    """Best of ours, and the reference beside it."""
    key = partial(Key, "step", case)
    best = smallest(values, [key(subject, declared.STEP) for subject in (declared.FUSED, declared.FUSED_COMPILED)])
    measured = ratio(values, key(best.subject, declared.RATE), product)
    return {
        key(declared.BEST, declared.MFU): values[key(best.subject, declared.MFU)],
        key(declared.BEST, declared.MFU_MEASURED): measured if isinstance(measured, str) else 100 * measured,
        key(declared.BEST, declared.MODE): named_best(values, best),
        key(declared.over_ours(declared.REFERENCE), declared.STEP): ratio(
            values, key(declared.REFERENCE, declared.STEP), best
        ),
    }
