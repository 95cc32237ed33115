"""The tables of the GPU benchmark: parts, cases, subjects, columns, units and bars. Knows no tensors and measures nothing.

Lengths name cases: the bars of L = 512 are looked for in the case called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.gpu_measures import Bar, Key, Measure

# Attention ------------------------------------------------------------------------------------------------------------

STREAM, DEFER, TABLE = "ours stream", "ours deferred", "ours table"
SMALL_BLOCK, CUDA_TABLE = "ours CUDA small block", "ours CUDA table, no dBias"
EAGER, COMPILED, SDPA = "eager", "eager + compile", "SDPA + bias"
FLEX_DENSE, FLEX_TABLE = "FlexAttention, dense", "FlexAttention, table"
DS4SCI, CUEQUIVARIANCE = "DS4Sci Evoformer", "cuEquivariance triangle"
OURS = (STREAM, DEFER, TABLE, SMALL_BLOCK)
"""Those of ours that give the gradient of the bias."""
CONTENDERS = (
    *OURS, CUDA_TABLE, EAGER, COMPILED, SDPA, FLEX_DENSE, FLEX_TABLE, DS4SCI, CUEQUIVARIANCE,
)  # fmt: skip
"""Ours come first: a competitor that breaks the device's context must not take their numbers with it."""
BEST, AUTOGRAD = "best of ours", "autograd"
RAGGED = "ragged"

FORWARD, FORWARD_WARM = "forward", "forward, warm"
BOTH, BOTH_WARM, BOTH_HOST = "fwd+bwd", "fwd+bwd, warm", "fwd+bwd, host"
STACK = "stack, a layer"
PEAK, STACK_PEAK = "peak", "stack, peak"
ERROR, GRADIENT_ERROR = "max error", "gradient error"
FLOOR_FORWARD, FLOOR_BOTH = "floor/forward", "floor/fwd+bwd"
VARIANTS, MODE = "variants", "mode"
ADDING = "adding one dBias"


def spread(column: str) -> tuple[str, str, str]:
    """A timed column and its percentiles."""
    return column, f"{column} p10", f"{column} p90"


ATTENTION_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(spread(FORWARD), "ms"),
    FORWARD_WARM: "ms",
    **dict.fromkeys(spread(BOTH), "ms"),
    BOTH_WARM: "ms",
    BOTH_HOST: "ms",
    **dict.fromkeys(spread(STACK), "ms"),
    PEAK: "GB",
    STACK_PEAK: "GB",
    ERROR: "",
    GRADIENT_ERROR: "",
    FLOOR_FORWARD: "%",
    FLOOR_BOTH: "%",
    VARIANTS: "",
}
COMPARED: Mapping[str, tuple[tuple[str, ...], float | None, float | None]] = {
    EAGER: ((EAGER,), None, 6.0),
    COMPILED: ((COMPILED,), None, None),
    SDPA: ((SDPA,), 1.3, 2.0),
    "FlexAttention": ((FLEX_DENSE, FLEX_TABLE), None, 3.0),
    DS4SCI: ((DS4SCI,), None, 2.0),
    CUEQUIVARIANCE: ((CUEQUIVARIANCE,), None, None),
}
"""Competitors by name: whose fastest counts, and the bars on forward and on stack where 256 <= L <= 2048."""


def mode_of(column: str) -> str:
    """Column that names the best of ours in `column`."""
    return f"{MODE}, {column}"


def over_ours(name: str) -> str:
    """Subject of a comparison."""
    return f"{name} over ours"


def case_of(length: int) -> str:
    """Name of the case of samples of one length."""
    return f"L={length}"


def attention_measures(lengths: Sequence[int]) -> list[Measure]:
    """The table of attention: all contenders, best of ours, comparisons."""
    measures = []
    for case in [*map(case_of, lengths), RAGGED]:
        for subject in CONTENDERS:
            measures += [Measure(Key("attention", case, subject, c), unit) for c, unit in ATTENTION_COLUMNS.items()]
        measures.append(Measure(Key("attention", case, AUTOGRAD, ADDING), "ms"))
        measures += _best_measures(case) + _comparisons(case)
    return measures


def _best_measures(case: str) -> list[Measure]:
    bars = {FORWARD: Bar("<=", 0.32), STACK: Bar("<=", 1.1)} if case == case_of(512) else {}
    best = [Measure(Key("attention", case, BEST, column), "ms", bars.get(column)) for column in (FORWARD, STACK)]
    return best + [Measure(Key("attention", case, BEST, mode_of(column)), "") for column in (FORWARD, STACK)]


def _comparisons(case: str) -> list[Measure]:
    judged = case in [case_of(length) for length in (256, 512, 1024, 2048)]
    measures = []
    for name, (_, forward, stack) in COMPARED.items():
        limits = {FORWARD: forward, STACK: stack, BOTH: None}
        for column, limit in limits.items():
            bar = Bar(">=", limit) if limit is not None and judged else None
            measures.append(Measure(Key("attention", case, over_ours(name), column), "x", bar))
    return measures


# Memory ---------------------------------------------------------------------------------------------------------------

ONE_LAYER_BYTES, STACK_BYTES = "one layer, bytes a pair-head", "stack, bytes a pair-head"
ONE_LAYER_GB, STACK_GB = "one layer", "stack"
MEMORY_LENGTHS = (512, 2048)
MEMORY_SUBJECTS = (STREAM, DEFER, TABLE)
MEMORY_COLUMNS = {ONE_LAYER_GB: "GB", STACK_GB: "GB", ONE_LAYER_BYTES: "B", STACK_BYTES: "B"}


def memory_measures(lengths: Sequence[int]) -> list[Measure]:
    """Peak memory of ours, inputs, outputs and gradients included."""
    measures = []
    for length in (length for length in MEMORY_LENGTHS if length in lengths):
        for subject in MEMORY_SUBJECTS:
            bars = {ONE_LAYER_BYTES: Bar("<=", 6.0)} if subject != TABLE else {}
            if subject == TABLE and length == 2048:
                bars = {ONE_LAYER_GB: Bar("<=", 0.5)}
            measures += [
                Measure(Key("memory", case_of(length), subject, column), unit, bars.get(column))
                for column, unit in MEMORY_COLUMNS.items()
            ]
    return measures


# Bias generation and node feature -------------------------------------------------------------------------------------

GENERATED = "ours by table"
MAKERS = (GENERATED, EAGER, COMPILED)
MAKER_COLUMNS = {
    **dict.fromkeys((*spread(FORWARD), *spread(BOTH)), "ms"),
    FORWARD_WARM: "ms",
    BOTH_WARM: "ms",
    BOTH_HOST: "ms",
    PEAK: "GB",
    ERROR: "",
}


def bias_measures(lengths: Sequence[int]) -> list[Measure]:
    """Making the bias from positions."""
    return _maker_measures("bias", lengths, dict.fromkeys((256, 512, 1024, 2048), 20.0))


def node_measures(lengths: Sequence[int]) -> list[Measure]:
    """Summing Gaussians over neighbours."""
    return _maker_measures("node", lengths, dict.fromkeys(lengths, 10.0))


def _maker_measures(part: str, lengths: Sequence[int], bars: Mapping[int, float]) -> list[Measure]:
    measures = []
    for length in lengths:
        case = case_of(length)
        for subject in MAKERS:
            measures += [Measure(Key(part, case, subject, c), unit) for c, unit in MAKER_COLUMNS.items()]
        bar = Bar(">=", bars[length]) if length in bars else None
        measures += [
            Measure(Key(part, case, over_ours(name), column), "x", bar if (name, column) == (EAGER, BOTH) else None)
            for name in (EAGER, COMPILED)
            for column in (FORWARD, BOTH)
        ]
    return measures


# Training step --------------------------------------------------------------------------------------------------------

PAPER, DEEP = "12x768", "24 layers, FFN 3072"
REFERENCE, FUSED, FUSED_COMPILED = "reference", "ours", "ours + compile"
TRAINED = (FUSED, FUSED_COMPILED, REFERENCE)
STEP, MICRO_BATCHES, RATE, MFU = "step", "micro-batches", "model rate", "MFU"
MFU_MEASURED = "of the measured rate"
STEP_COLUMNS = {**dict.fromkeys(spread(STEP), "ms"), PEAK: "GB", MICRO_BATCHES: "", RATE: "TFLOP/s", MFU: "%"}
STEP_LENGTHS = (128, 512, 2048)
DEVICE, PRODUCT = "device", "matrix product 8192, bf16"
_FASTER = {128: 2.0, 512: 3.5, 2048: 5.0}
_MFU = {(PAPER, 128): 38.0, (PAPER, 512): 27.0, (DEEP, 128): 45.0, (DEEP, 512): 35.0}


def step_cases(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """Models and lengths that are trained."""
    return [(model, length) for model in (PAPER, DEEP) for length in STEP_LENGTHS if length in lengths]


def step_case(model: str, length: int) -> str:
    """Name of a training case."""
    return f"{model}, {case_of(length)}"


def step_measures(lengths: Sequence[int]) -> list[Measure]:
    """Training steps of two models."""
    measures = [Measure(Key("step", DEVICE, PRODUCT, RATE), "TFLOP/s")]
    for model, length in step_cases(lengths):
        case = step_case(model, length)
        for subject in TRAINED:
            measures += [Measure(Key("step", case, subject, c), unit) for c, unit in STEP_COLUMNS.items()]
        faster = Bar(">=", _FASTER[length]) if model == PAPER else None
        mfu = Bar(">=", _MFU[model, length]) if (model, length) in _MFU else None
        measures += [
            Measure(Key("step", case, BEST, MFU), "%", mfu),
            Measure(Key("step", case, BEST, MFU_MEASURED), "%"),
            Measure(Key("step", case, BEST, MODE), ""),
            Measure(Key("step", case, over_ours(REFERENCE), STEP), "x", faster),
        ]
    return measures


PARTS = {
    "attention": (attention_measures, (FORWARD, BOTH, STACK, PEAK, ERROR, FLOOR_FORWARD, FLOOR_BOTH)),
    "bias": (bias_measures, (FORWARD, BOTH, PEAK, ERROR)),
    "node": (node_measures, (FORWARD, BOTH, PEAK, ERROR)),
    "memory": (memory_measures, tuple(MEMORY_COLUMNS)),
    "step": (step_measures, (STEP, MICRO_BATCHES, PEAK, RATE, MFU)),
}
"""By part: its measures for some lengths, and the columns that are printed."""
TEXTS = (VARIANTS, MODE, *(mode_of(column) for column in (FORWARD, STACK)))
"""Columns whose values are texts where all is well."""
