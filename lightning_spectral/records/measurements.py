"""What is known of the weights at a step, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from lightning_spectral.display import profile_figure
from lightning_spectral.records.frames import dataframe
from lightning_spectral.records.text import Table, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = [
    "FunctionalMeasurement",
    "LayerMeasurement",
    "Linearization",
    "Measurement",
    "OutputKind",
    "OutputMeasurement",
    "WeightSignals",
]

Linearization = Literal["circuit", "paper", "jacobian"]

OutputKind = Literal["sample", "stream", "token"]

NOT_FINITE = "weights are not finite (NaN or Inf)"
"""The reason of a branch without a norm whose weights are not numbers any more."""


@dataclass(frozen=True, slots=True)
class FunctionalMeasurement:
    """What the two branches of a block do as functions, by their Jacobians J and by what they add to the stream.

    A measurement of weights knows the updates at most, and those only where a batch was looked at. Gains are root mean
    squares over random perturbations. A quantity that does not exist is ``None``.

    Attributes:
        frobenius_ratio: ‖J_mlp‖_F / ‖J_attention‖_F, the ratio of the average gains. An estimate from a few probes.
        update_ratio: ‖MLP branch‖_F / ‖attention branch‖_F, of what they add to the stream.
        update_cosine: Cosine of the angle between the two.
        mlp_gain_mean: Gain of the MLP branch on what all tokens share, ‖PJP‖_F / √rank P, P the mean over tokens.
        mlp_gain_deviation: Its gain on what sets tokens apart, ‖ΠJΠ‖_F / √rank Π with Π = I − P.
        attention_gain_mean: The first of these for the attention branch.
        attention_gain_deviation: The second of these for the attention branch.
        mlp_share: ‖MLP branch‖_F / ‖stream behind the block‖_F, of a real pass: how much of the stream it has written.
        attention_share: The same for the attention branch.
        attention_logit: The largest attention logit q·k/√d of a few samples, over heads and pairs of tokens that may
            see each other. ``None`` where the model uses a kernel that does not show it.
        finite_differences: Whether some operation cannot be differentiated twice: then differences stand in for it.
    """

    frobenius_ratio: float | None = None
    update_ratio: float | None = None
    update_cosine: float | None = None
    mlp_gain_mean: float | None = None
    mlp_gain_deviation: float | None = None
    attention_gain_mean: float | None = None
    attention_gain_deviation: float | None = None
    mlp_share: float | None = None
    attention_share: float | None = None
    attention_logit: float | None = None
    finite_differences: bool = False


@dataclass(frozen=True, slots=True)
class OutputMeasurement:
    """What the model returns for the samples of a batch. A quantity that cannot be measured is ``None``.

    Attributes:
        sample_residual: ‖O − Ō‖_F / ‖O‖_F, of a few samples, in evaluation mode; Ō is the mean over samples. 0 where
            the model gives the same for all of them.
        batch_residual: The same of the whole batch, as the training pass has it, dropout included.
        kind: What the output has a vector for: ``"sample"``, ``"token"`` (or query), or ``"stream"``: for every token
            one of the width of the stream, which may be the stream itself, and may be pooled behind the model.
        width: Numbers in a vector.
        finite: Whether every number of it is finite, in both.
        pooled_residual: The sample residual of what the output is made of: of each of the few samples, the mean of the
            tokens behind the last block that it depends on. That is the class token, or the last one, or all but the
            padding. Known for the kind ``"sample"``, and for ``"stream"`` where the loss reads one vector of each
            sample; not where weights are sharded.
    """

    sample_residual: float | None
    batch_residual: float | None = None
    kind: OutputKind = "token"
    width: int = 0
    finite: bool = True
    pooled_residual: float | None = None


@dataclass(frozen=True, slots=True)
class WeightSignals:
    """What becomes of the weights of a block. ``None`` where it was not asked for, or is not known.

    A is the operator whose spectral norm was measured; in a mixture of experts, that of the expert with the largest
    norm. What a norm layer behind a matrix divides by is left out of A.

    Attributes:
        mlp_change: ‖A′ − A‖_F / ‖A‖_F of the MLP branch, A′ now and A at the last measurement; an estimate from random
            probes. ``None`` in the first measurement.
        attention_change: The same of the attention branch.
        mlp_moved: Whether any parameter of the MLP branch that a measurement reads and the run trains differs from what
            it was at the first measurement of the run. ``None`` where the run trains none.
        attention_moved: The same of the attention branch, whose queries and keys a measurement does not read.
        mlp_stable_rank: ‖A‖_F² / ‖A‖₂² of the MLP branch, between 1 and its rank.
        attention_stable_rank: The same of the attention branch.
        alignment: Absolute value of ⟨u, v⟩, u the dominant left singular vector of this block's MLP branch and v the
            dominant right singular vector of the next block's attention branch (of the other branch, where a block has
            one only). ``None`` for the last block, and between blocks of different widths or stacks.
        logit_bound: What no logit of the attention exceeds in magnitude, the largest of all heads, for inputs that the
            norm in front has normalized, and without biases. ``None`` where the logits are not understood, such as
            those of latent attention. :func:`~lightning_spectral.measuring.logit_bounds.logit_bound` has the formulas.
    """

    mlp_change: float | None = None
    attention_change: float | None = None
    mlp_moved: bool | None = None
    attention_moved: bool | None = None
    mlp_stable_rank: float | None = None
    attention_stable_rank: float | None = None
    alignment: float | None = None
    logit_bound: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class LayerMeasurement:
    """The spectral norms of one block. A quantity that does not exist or cannot be computed is ``None``, never 0.

    Attributes:
        index: Index of the block.
        name: Module path of the block.
        mlp_norm: Spectral norm of the MLP branch.
        attention_norm: Spectral norm of the attention branch.
        mlp_scale: Residual scale of the MLP branch, 1.0 where none is attached.
        attention_scale: Residual scale of the attention branch, 1.0 where none is attached.
        mlp_expert: Expert with the largest norm, ``None`` for a dense MLP.
        mlp_reason: Why ``mlp_norm`` is ``None`` although the block has such a branch.
        attention_reason: Why ``attention_norm`` is ``None`` although the block has such a branch.
        error_bound: Relative a posteriori error bound, the larger of the two norms'.
        doubt: What failed in the self-check of the block, ``None`` where it passed.
        functional: What the branches do as functions, ``None`` where no batch was looked at.
        token_residual: ‖X − 1x̄ᵀ‖_F / ‖X‖_F of the block's output, mean over sequences of a batch; 0 where all
            tokens have become one vector. ``None`` where no batch was looked at.
        typical_token_residual: The same without massive activations, the few tokens and dimensions that are more than
            100 times as large as the median: they hide a collapse of the other tokens, or look like one.
        effective_rank: Effective rank of the block's output, on squared singular values, of a few sequences.
        sample_residual: ‖X − X̄‖_F / ‖X‖_F of the block's output without massive activations, X̄ the mean over a few
            samples; 0 where all samples have become one.
        stream_rms: Root mean square of the block's output.
        stream_finite: Whether every number of the block's output is finite.
        weights: What becomes of the weights, ``None`` where nothing of it is known.
    """

    index: int
    name: str
    mlp_norm: float | None
    attention_norm: float | None
    mlp_scale: float = 1.0
    attention_scale: float = 1.0
    mlp_expert: int | str | None = None
    mlp_reason: str | None = None
    attention_reason: str | None = None
    error_bound: float | None = None
    doubt: str | None = None
    functional: FunctionalMeasurement | None = None
    token_residual: float | None = None
    typical_token_residual: float | None = None
    effective_rank: float | None = None
    sample_residual: float | None = None
    stream_rms: float | None = None
    stream_finite: bool = True
    weights: WeightSignals | None = None

    @property
    def ratio(self) -> float | None:
        """The spectral ratio ‖MLP branch‖₂ / ‖attention branch‖₂, ``None`` unless both norms are positive numbers."""
        if not _is_positive(self.mlp_norm) or not _is_positive(self.attention_norm):
            return None
        return self.mlp_norm / self.attention_norm

    @property
    def log_ratio(self) -> float | None:
        """ln ρ, the quantity that everything averages, smooths and controls."""
        if not _is_positive(self.mlp_norm) or not _is_positive(self.attention_norm):
            return None
        return math.log(self.mlp_norm) - math.log(self.attention_norm)

    def __repr__(self) -> str:
        """Return the ratio and what differs from the defaults."""
        values = ((item.name, getattr(self, item.name), item.default) for item in fields(self))
        shown = ", ".join(f"{name}={value!r}" for name, value, usual in values if value != usual)
        return f"LayerMeasurement(ratio={self.ratio!r}, {shown})"

    def row(self) -> dict[str, Any]:
        """Return the numbers by name, the ratio among them: a row of a table."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        update = plain.pop("functional") or FunctionalMeasurement()
        weights = plain.pop("weights") or WeightSignals()
        first = {"index": self.index, "name": self.name, "ratio": self.ratio}
        return {**first, **plain, "reason": self.reason, **asdict(update), **asdict(weights)}

    @property
    def broken_branch(self) -> str | None:
        """The branch whose weights are not finite, ``"attention"`` or ``"mlp"``, the first of them; else ``None``."""
        broken = {"attention": self.attention_reason, "mlp": self.mlp_reason}
        return next((branch for branch, reason in broken.items() if reason == NOT_FINITE), None)

    @property
    def finite(self) -> bool:
        """Whether the weights of the block are finite and, where a batch was looked at, its output."""
        return self.broken_branch is None and self.stream_finite

    @property
    def reason(self) -> str | None:
        """Why a norm or the ratio is missing, ``None`` where nothing is: also that the block has no such branch."""
        branches = (
            ("mlp", self.mlp_norm, self.mlp_scale, self.mlp_reason),
            ("attention", self.attention_norm, self.attention_scale, self.attention_reason),
        )
        whys = [(word, reason or _why_missing(norm, scale)) for word, norm, scale, reason in branches]
        return "; ".join(f"{word}: {why}" for word, why in whys if why is not None) or None


@dataclass(frozen=True, slots=True, repr=False)
class Measurement(Tabular):
    """The spectral norms of every block at one moment.

    Attributes:
        step: Optimizer step at which the measurement was taken.
        linearization: The rule that turned branches into linear operators. Never compare across rules.
        layers: One record per block, in the order of execution.
        safe_zone: The interval of ratios that the summary calls inside.
        seconds: Wall time of the measurement.
        adapters: The part of branches with adapters that was measured; see :func:`~lightning_spectral.measure`.
        notes: What a reader of the numbers should know beside them, a sentence each.
        output: What the model returned for a batch, ``None`` where no batch was looked at.

    Example:
        >>> measurement = measure(model)
        >>> measurement.summary()["in_zone"]
        1.0
        >>> measurement.layers[0].name
        'transformer.h.0'
    """

    step: int
    linearization: Linearization
    layers: tuple[LayerMeasurement, ...]
    safe_zone: tuple[float, float] = (0.5, 2.0)
    seconds: float = field(default=0.0, compare=False)
    adapters: Literal["sum", "base", "delta"] = "sum"
    notes: tuple[str, ...] = ()
    output: OutputMeasurement | None = None

    @property
    def has_zone(self) -> bool:
        """Whether the safe zone is about these ratios. Nobody has calibrated one for Jacobians, or for a difference."""
        return self.linearization != "jacobian" and self.adapters != "delta"

    @property
    def zone_words(self) -> str:
        """The safe zone in words, for a title."""
        low, high = self.safe_zone
        return f"safe zone ({low:g}, {high:g})" if self.has_zone else "no safe zone is known"

    def side(self, layer: LayerMeasurement) -> Literal["above", "below", ""]:
        """Return the side of the safe zone that a layer is on; empty inside, without a ratio or without a safe zone."""
        low, high = self.safe_zone
        if not self.has_zone or layer.ratio is None or low < layer.ratio < high:
            return ""
        return "above" if layer.ratio >= high else "below"

    def __iter__(self) -> Iterator[LayerMeasurement]:
        """Iterate over the layers."""
        return iter(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the ratio and the reason of every layer.

        All of it is JSON by the standard, which has no NaN and no infinity: such a number is ``None``.
        """
        layers = [_plain(layer) for layer in self.layers]
        values: dict[str, Any] = {
            "step": self.step,
            "linearization": self.linearization,
            "safe_zone": list(self.safe_zone),
            "seconds": self.seconds,
            "layers": list(map(_finite, layers)),
        }
        output = None if self.output is None else asdict(self.output)
        beside = {"adapters": self.adapters, "notes": list(self.notes), "output": output}
        return values | {name: value for name, value in beside.items() if value not in ("sum", [], None)}

    def summary(self) -> dict[str, float]:
        """Return the summary values of the measurement, by the names they are logged under.

        Values that do not exist (no measurable ratio, a linearization without a safe zone) are absent.
        Where weights or the stream are not finite, values of them are NaN: what is left would look healthy.
        """
        values = self._of_ratios()
        for branch in ("mlp", "attention"):
            norms = [norm for layer in self.layers if (norm := getattr(layer, f"{branch}_norm")) is not None]
            if norms:
                values[f"{branch}_norm_max"] = max(norms)
            if any(getattr(layer, f"{branch}_reason") == NOT_FINITE for layer in self):
                values[f"{branch}_norm_max"] = math.nan
        values |= self._of_batch()
        reasons = [reason for layer in self.layers for reason in (layer.mlp_reason, layer.attention_reason)]
        values["unmeasured"] = float(sum(reason is not None for reason in reasons))
        values["seconds"] = self.seconds
        return values

    def _of_ratios(self) -> dict[str, float]:
        ratios = [layer.log_ratio for layer in self.layers if layer.log_ratio is not None]
        values: dict[str, float] = {}
        if ratios:
            values["ratio_min"] = math.exp(min(ratios))
            values["ratio_median"] = math.exp(median(ratios))
            values["ratio_max"] = math.exp(max(ratios))
        if ratios and self.has_zone:
            low, high = math.log(self.safe_zone[0]), math.log(self.safe_zone[1])
            values["in_zone"] = sum(low < value < high for value in ratios) / len(ratios)
        if any(layer.broken_branch is not None for layer in self):
            zone = ("in_zone",) if self.has_zone else ()
            values |= dict.fromkeys(("ratio_min", "ratio_median", "ratio_max", *zone), math.nan)
        return values

    def _of_batch(self) -> dict[str, float]:
        values = {}
        for quantity in ("token_residual", "effective_rank", "sample_residual"):
            seen = [value for layer in self.layers if (value := getattr(layer, quantity)) is not None]
            if seen:
                values[f"{quantity}_min"] = min(seen)
            if not all(layer.stream_finite for layer in self):
                values[f"{quantity}_min"] = math.nan
        logits = [layer.functional.attention_logit for layer in self.layers if layer.functional is not None]
        if seen := [logit for logit in logits if logit is not None]:
            values["attention_logit_max"] = max(seen)
        for name, quantity in (("output_residual", "sample_residual"), ("pooled_residual", "pooled_residual")):
            if (value := getattr(self.output, quantity, None)) is not None:
                values[name] = value
        return values

    @property
    def is_scaled(self) -> bool:
        """Whether some branch has a residual scale other than 1."""
        return any(layer.mlp_scale != 1.0 or layer.attention_scale != 1.0 for layer in self)

    def to_dataframe(self) -> DataFrame:
        """Return a ``pandas.DataFrame`` with a row for every block.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return dataframe([{"step": self.step, **layer.row()} for layer in self])

    def plot(self) -> Figure:
        """Draw both norms and the ratio of every block.

        Returns:
            A figure that belongs to no global state. Save it with ``figure.savefig(path)``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return profile_figure(
            [layer.index for layer in self],
            [layer.mlp_norm for layer in self],
            [layer.attention_norm for layer in self],
            [layer.ratio for layer in self],
            zone=self.safe_zone if self.has_zone else None,
            title=f"Step {self.step}, “{self.linearization}”" if self.step else f"“{self.linearization}”",
        )

    def _table(self) -> Table:
        adapters = "" if self.adapters == "sum" else f"adapters={self.adapters!r}, "
        step = f"step {self.step}, " if self.step else ""  # 0 also where nobody knows it: in a checkpoint, by hand
        title = (
            f"spectral ratio ‖mlp‖₂/‖attention‖₂, linearization={self.linearization!r}, {adapters}{step}"
            f"{self.zone_words}"
        )
        scaled = self.is_scaled  # most models have no scales
        columns = [">4", "<block", ">10mlp", ">10attention", ">8ratio", *([">13scales"] if scaled else []), "<"]
        rows = [_row(layer, self._note(layer), scaled=scaled) for layer in self]
        return Table(title, columns, rows, [f"note: {note}" for note in self.notes])

    def _note(self, layer: LayerMeasurement) -> str:
        side = self.side(layer)
        note = f"{side} the safe zone" if side else layer.reason or ""
        return "; ".join(filter(None, [note, layer.doubt and f"not verified: {layer.doubt}"]))


def _row(layer: LayerMeasurement, note: str, *, scaled: bool) -> list[str]:
    numbers = ["-" if x is None else f"{x:.4g}" for x in (layer.mlp_norm, layer.attention_norm, layer.ratio)]
    scales = [f"{layer.mlp_scale:>5.3g} : {layer.attention_scale:<5.3g}"] if scaled else []
    return [str(layer.index), layer.name, *numbers, *scales, note]


def _is_positive(norm: float | None) -> TypeGuard[float]:
    return norm is not None and 0 < norm < math.inf


def _why_missing(norm: float | None, scale: float) -> str | None:
    """Say why a norm that has no reason of its own gives no ratio."""
    if not math.isfinite(scale):
        return f"its residual scale is {scale}"
    if norm is None:
        return "the block has none"
    if _is_positive(norm):
        return None
    return "its norm is zero" if norm == 0 else f"its norm is {norm}"


def _plain(layer: LayerMeasurement) -> dict[str, Any]:
    """Return the values of a layer. Signals of weights that are not known take no place in a file."""
    values = asdict(layer) | {"ratio": layer.ratio, "reason": layer.reason}
    known = {name: value for name, value in (values.pop("weights") or {}).items() if value is not None}
    return values | ({"weights": known} if known else {})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values in which a number that is not finite is ``None``."""
    finite = {name: _finite(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in finite.items()
    }
