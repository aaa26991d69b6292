"""The signs that rules look for, each a pure function of a measurement and of what came before it.

A sign answers ``None`` where the measurement cannot show it: without tokens, nothing is known of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_spectral.alarms.memory import WARMUP_STEPS, Memory, Point, line_through
from lightning_spectral.alarms.trends import forecast
from lightning_spectral.records import Forecast, LayerMeasurement, Measurement

__all__ = [
    "COLLAPSED",
    "Look",
    "Sign",
    "log_residual",
    "logarithm",
    "logits_exploding",
    "not_finite",
    "nothing_moves",
    "samples_collapsed",
    "spreads",
    "stack_ends",
    "tokens_collapsed",
    "tokens_collapsing",
]

COLLAPSED = 0.01  # below this residual, tokens or samples are one to within 1 % of their size
# A few samples of one class may be alike to within 1 % in a healthy model. They are one below the first number, or if
# the outputs of the whole batch are alike too, to within the second number, which leaves room for dropout.
_THE_SAME, _ALIKE_IN_BATCH = 1e-4, 0.3
# An output of this many numbers for a sample is an embedding. Embeddings of a few samples and those of the whole batch,
# dropout included, are one below this residual.
_EMBEDDING, _EMBEDDINGS_ALIKE = 8, 0.05
LARGE_LOGIT = 100.0
TOWARD = 0.1  # a fall over depth counts only if it ends below this token residual
RISING = math.log(1.2)  # a residual rises if it has grown by this, in ln r, since the measurement before
FAR = math.log(3.0)  # a residual has fallen, or risen, if it is this far from its peak, or its first value, in ln r
ROUNDING = 3e-7  # below this residual, tokens and samples differ by rounding
_LEAST = 1e-12  # a residual of 0 counts as this, because trends are fitted to ln r


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rule sees in one measurement.

    Attributes:
        seen: Whether its sign is there.
        layers: The blocks that show it.
        branch: The branch that shows it, where it is one.
        values: Numbers for the message and the event, by name.
        forecast: When it will have come to the worst.
    """

    seen: bool
    layers: Sequence[LayerMeasurement] = ()
    branch: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    forecast: Forecast | None = None


Look = Callable[[Memory, Measurement], Sign | None]


def log_residual(layer: LayerMeasurement) -> float | None:
    """Return ln r without massive activations, which can hide a collapse of the other tokens or look like one."""
    residual = layer.typical_token_residual
    return None if residual is None else logarithm(residual)


def logarithm(residual: float, *, least: float = _LEAST) -> float:
    """Return ln r, finite for a residual of 0 too: a smaller one counts as the least."""
    return math.log(max(residual, least))


def not_finite(memory: Memory, measurement: Measurement) -> Sign:
    """See whether weights, the stream or the output have a number that is not finite."""
    layers = [layer for layer in measurement if not layer.finite]
    output = measurement.output is None or measurement.output.finite
    branch = layers[0].broken_branch if layers else None
    return Sign(bool(layers) or not output, layers[:1], branch, {"blocks_not_finite": float(len(layers))})


def tokens_collapsed(memory: Memory, measurement: Measurement) -> Sign | None:
    """See whether all tokens behind the last block of a stack are one vector.

    Where the model has one output for a sample, its tokens may rightly agree at the end: then samples have to agree
    too. So they have where it returns the stream, which the training step may pool. A residual that rises is a collapse
    that ends. One that has risen since the run began, and not fallen since, belongs to a model whose tokens begin
    alike, such as one that begins with convolutions and BatchNorm: their biases are in all tokens. Blocks that mix no
    tokens make none alike: behind them, tokens are as the data are, such as a variable that is the same at all times.
    """
    mixing = {_stack(layer.name) for layer in measurement if _mixes_tokens(layer)}
    known = [layer for layer in stack_ends(measurement) if layer.typical_token_residual is not None]
    ends = [layer for layer in known if _stack(layer.name) in mixing]
    if not ends:
        return None
    alike = [
        layer
        for layer in ends
        if _below(layer.typical_token_residual)
        and not _rises(memory.blocks[layer.index].residuals)
        and not _came_apart(memory, f"token_residual/{layer.index}")
        and (_keeps_tokens_apart(measurement) or _alike(layer.sample_residual, measurement))
    ]
    worst = min(alike or ends, key=lambda layer: layer.typical_token_residual or 0.0)
    return Sign(bool(alike), [worst], values=_over_time("token_residual", memory.blocks[worst.index].residuals))


def samples_collapsed(memory: Memory, measurement: Measurement) -> Sign | None:
    """See whether the stream, what the output is made of, or the embedding of a sample is the same for all samples.

    What the output is made of is the class token, the last token or the mean of some, see
    :class:`~lightning_spectral.records.OutputMeasurement`. Outputs other than embeddings are left out, because they may
    rightly be nearly the same. A language model begins with the frequencies of its tokens, the queries of a detector
    differ more than pictures do, and a number to be predicted may have a mean that is large beside its deviations.

    A healthy model may begin with one output for all: a LayerScale of 1e-5 hides what a class token has seen. So
    class tokens and embeddings have to have come closer, or to stay the same to rounding, and so has a stream of one
    token, which class tokens have to themselves.
    """
    ends = [layer for layer in stack_ends(measurement) if layer.sample_residual is not None]
    known = spreads(measurement)
    values = {name: value for name, value in known.items() if name in ("output_residual", "pooled_residual")}
    if not ends and not values:
        return None
    alike = [
        layer
        for layer in ends
        if _alike(layer.sample_residual, measurement)
        and not _came_apart(memory, f"sample_residual/{layer.index}")
        and (layer.token_residual is not None or _is_rounding(layer, memory, measurement))
    ]
    embeddings, pooled = values.get("output_residual"), values.get("pooled_residual")
    of_one = embeddings is not None and embeddings < _EMBEDDINGS_ALIKE and _fell(memory, "output_residual", measurement)
    reads_one = _alike(pooled, measurement) and _fell(memory, "pooled_residual", measurement)
    reads_one = reads_one and not _rises(memory.spreads["pooled_residual"])
    if ends:
        values = {**values, "sample_residual": min(layer.sample_residual or 0.0 for layer in ends)}
    return Sign(bool(alike) or of_one or reads_one, alike[:1], values=values)


def spreads(measurement: Measurement) -> dict[str, float]:
    """Return how far tokens and samples are from being one, where known: of embeddings, and of every block."""
    output = measurement.output
    found = {
        "output_residual": _spread_of_embeddings(measurement),
        "pooled_residual": None if output is None else output.pooled_residual,
    }
    for layer in stack_ends(measurement):
        found[f"token_residual/{layer.index}"] = layer.typical_token_residual
        found[f"sample_residual/{layer.index}"] = layer.sample_residual
    return {name: value for name, value in found.items() if value is not None}


def _fell(memory: Memory, name: str, measurement: Measurement) -> bool:
    """Whether a spread has fallen in this run, or is nothing but rounding in a run that is under way."""
    value = memory.spreads[name][-1][1]
    rounding = value <= math.log(ROUNDING) and _under_way(memory, measurement)
    return memory.peaks[name] - value > FAR or rounding


def _came_apart(memory: Memory, name: str) -> bool:
    """Whether a spread has risen since the run began, and not fallen since."""
    value = memory.spreads[name][-1][1]
    return value - memory.firsts[name] > FAR and memory.peaks[name] - value <= FAR


def _is_rounding(layer: LayerMeasurement, memory: Memory, measurement: Measurement) -> bool:
    return (layer.sample_residual or 0.0) <= ROUNDING and _under_way(memory, measurement)


def _under_way(memory: Memory, measurement: Measurement) -> bool:
    return measurement.step - (memory.began or 0) >= WARMUP_STEPS


def tokens_collapsing(memory: Memory, measurement: Measurement) -> Sign | None:
    """See whether tokens are on their way to one vector, over depth or over training, where attention dominates.

    A healthy run may begin with tokens that are nearly alike. Where they go on, attention outweighs the MLP in some
    block: attention averages tokens. A model with one output for a sample may make its tokens alike.

    Over training: a robust trend of the last block's residual reaches collapse within as many steps as it has been seen
    for. Over depth: the residual falls from block to block to less than 0.1.
    """
    depth = [(layer.index, r) for layer in measurement if (r := log_residual(layer)) is not None]
    if not depth:
        return None
    last = next(layer for layer in measurement if layer.index == depth[-1][0])
    dominated = any(block.stays < 0 for block in memory.blocks.values())
    history = memory.blocks[last.index].residuals
    line, fall = line_through(history), line_through(depth)
    coming = forecast(line, math.log(COLLAPSED)) if line is not None and line.falls else None
    soon = coming is not None and coming.at - history[-1][0] <= history[-1][0] - history[0][0]
    over_depth = fall is not None and fall.falls and fall.level < math.log(TOWARD)
    values = {"first_token_residual": math.exp(depth[0][1])} | _over_time("token_residual", history)
    seen = (over_depth or soon) and dominated and _keeps_tokens_apart(measurement) and not _rises(history)
    return Sign(seen, [last], values=values, forecast=coming if soon else None)


def nothing_moves(memory: Memory, measurement: Measurement) -> Sign | None:
    """See whether no branch that the run trains has moved since the first measurement."""
    flags = [
        flag
        for layer in measurement
        if layer.weights is not None
        for flag in (layer.weights.mlp_moved, layer.weights.attention_moved)
        if flag is not None
    ]
    if not flags or measurement.step == memory.began:
        return None
    return Sign(not any(flags), values={"branches": float(len(flags)), "step_before": float(memory.began or 0)})


def logits_exploding(memory: Memory, measurement: Measurement) -> Sign | None:
    """See whether some attention has logits above 100, at which QK-Clip acts too (Kimi Team, arXiv:2507.20534)."""
    known = [(layer.functional.attention_logit, layer) for layer in measurement if layer.functional is not None]
    logits = [(logit, layer) for logit, layer in known if logit is not None]
    if not logits:
        return None
    logit, worst = max(logits, key=lambda item: item[0])
    series = memory.blocks[worst.index].sizes["logit"]
    before = {"attention_logit_before": series[0][1], "step_before": float(series[0][0])}
    return Sign(logit > LARGE_LOGIT, [worst], "attention", {"attention_logit": logit, **before})


def _below(residual: float | None) -> bool:
    return residual is not None and residual < COLLAPSED


def _keeps_tokens_apart(measurement: Measurement) -> bool:
    """Whether the model has an output for every token, as far as one can see, and no training step that pools them."""
    return measurement.output is None or measurement.output.kind == "token"


def _spread_of_embeddings(measurement: Measurement) -> float | None:
    """Return the residual of embeddings over samples, of a few samples or of the batch, whichever is larger."""
    output = measurement.output
    if output is None or output.kind != "sample" or output.width < _EMBEDDING or output.sample_residual is None:
        return None
    return max(output.sample_residual, output.batch_residual or 0.0)


def _alike(residual: float | None, measurement: Measurement) -> bool:
    """Whether a residual of a few samples says that all samples are one."""
    if residual is None or residual >= COLLAPSED:
        return False
    batch = None if measurement.output is None else measurement.output.batch_residual
    return residual < _THE_SAME or batch is None or batch < _ALIKE_IN_BATCH


def _rises(history: Sequence[Point]) -> bool:
    return len(history) > 1 and history[-1][1] - history[-2][1] > RISING and history[-1][1] > math.log(COLLAPSED / 10)


def _over_time(name: str, history: Sequence[Point]) -> dict[str, float]:
    """Return the last and the first number of a series that the window still has."""
    if not history:
        return {}
    (step, first), (_, last) = history[0], history[-1]
    return {name: math.exp(last), f"{name}_before": math.exp(first), "step_before": float(step)}


def stack_ends(measurement: Measurement) -> list[LayerMeasurement]:
    """Return the last block with measured tokens of every stack: blocks whose names differ by a number."""
    ends: dict[str, LayerMeasurement] = {}
    for layer in measurement:
        if layer.stream_rms is not None or not layer.stream_finite:
            ends[_stack(layer.name)] = layer
    return list(ends.values())


def _mixes_tokens(layer: LayerMeasurement) -> bool:
    """Whether a block has attention or another mixer of tokens, measured or with a reason why not."""
    return layer.attention_norm is not None or layer.attention_reason is not None


def _stack(name: str) -> str:
    parts = name.partition(" + ")[0].split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1]]) if numbered else ""
