"""The frozen records that travel between the rooms of this package.

A model is described by :class:`ResidualBlock`, :class:`Branch`, :class:`Path` and :class:`Factor`, which hold names and
layouts but never a tensor: they survive pickling, deepcopy, wrapping in DDP and a change of device. A measurement is
described by :class:`Measurement` and :class:`LayerMeasurement`, which hold plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lightning_spectral.display import measurement_table, profile_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Branch",
    "BranchKind",
    "End",
    "Factor",
    "FactorRole",
    "FunctionalMeasurement",
    "LayerMeasurement",
    "Linearization",
    "Measurement",
    "Path",
    "ResidualBlock",
]

Linearization = Literal["circuit", "paper", "jacobian"]
BranchKind = Literal["attention", "cross_attention", "mlp", "mixer"]
FactorRole = Literal["scale", "post_norm", "output", "inner_norm", "value", "latent", "down", "up", "pre_norm"]


@dataclass(frozen=True, slots=True)
class Factor:
    """One weight matrix, diagonal norm gain or residual multiplier of a branch.

    Matrices are read as ``(out_features, in_features)``. The parameter is fetched by attribute path, then ``layout`` is
    applied step by step (view operations such as ``("select", 0, 3)`` or ``("t",)``), then ``rows`` picks output rows.

    Attributes:
        role: What the factor is to its branch. ``"output"`` and ``"value"`` are W_o and W_v, ``"latent"`` a further
            matrix on the value path (multi-head latent attention), ``"down"`` and ``"up"`` the two ends of the MLP;
            ``"pre_norm"``, ``"inner_norm"`` and ``"post_norm"`` are norm gains; ``"scale"`` is a residual multiplier.
        parameter: Attribute path from the model, such as ``"layers.0.mlp.up_proj.weight"``; ``None`` for a norm
            without gain and for a constant multiplier.
        layout: Tensor methods that make the matrix ``(out_features, in_features)``, or the gain, of the stored
            parameter: empty for ``nn.Linear``, ``(("add", 1.0),)`` where a family stores gain - 1.
        rows: Output rows, in the order in which the next factor reads them; a row may repeat (grouped-query
            attention). ``None`` means all rows once, in order.
        constant: A constant multiplier, 1.0 for none.
        size: Number of channels of a norm (``None`` for matrices and multipliers).
        adapters: What the model adds to the matrix, such as low-rank adapters: chains of matrices and multipliers, the
            leftmost first. ``rows`` picks rows of the sum.
    """

    role: FactorRole
    parameter: str | None
    layout: tuple[tuple[Any, ...], ...] = ()
    rows: tuple[range, ...] | None = None
    constant: float = 1.0
    size: int | None = None
    adapters: tuple[tuple[Factor, ...], ...] = ()

    def flat(self) -> Iterator[Factor]:
        """Yield the factor and those of its adapters."""
        yield self
        yield from (factor for chain in self.adapters for factor in chain)


@dataclass(frozen=True, slots=True)
class Path:
    """One chain of factors from the site back to the residual stream, the factor nearest the site first.

    Attributes:
        factors: The chain, in the order of the matrix product.
        expert: Index of the expert in a mixture of experts, ``"shared"`` for an always-active one, else ``None``.
    """

    factors: tuple[Factor, ...]
    expert: int | str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """A parameter at the end of a branch. All ends of a branch together carry its size.

    Attributes:
        parameter: Attribute path from the model.
        offset: What the model adds to the stored parameter before it uses it: 1.0 for the gain of a norm that is stored
            as ``w`` and used as ``1 + w``, else 0. To scale the end by c, store ``c * (offset + w) - offset``.
    """

    parameter: str
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Branch:
    """A path from the residual stream back into it.

    Attributes:
        kind: ``"attention"``, ``"cross_attention"``, ``"mlp"`` or ``"mixer"`` (a token mixer that is not attention).
        site: Absolute path of the module whose output is added to the stream; ``"param:<path>"`` where no module
            carries the branch and only a weight could be scaled.
        output_index: Element of the site's output tuple that is the branch, ``None`` where the output is a tensor.
        paths: The linear chains of the branch: one for a dense branch, one per expert for a mixture of experts, none
            where no weight linearization exists.
        reason: Why there is no weight linearization, ``None`` where there is one.
        ends: The parameters (weights and biases, or gain and bias of a norm behind them) that have to be scaled to
            scale the branch: its output is homogeneous of degree one in them together, and nothing else uses them.
        ends_reason: Why there are no such parameters, ``None`` where there are.
        aliases: Further paths of the module at the site. A module that several blocks share is one branch, listed in
            the first block that runs it; what scales it there scales it in all of them.
    """

    kind: BranchKind
    site: str
    output_index: int | str | None = None
    paths: tuple[Path, ...] = ()
    reason: str | None = None
    ends: tuple[End, ...] = ()
    ends_reason: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Every distinct factor of the branch, the one nearest the site first, each matrix before its adapters."""
        return tuple(dict.fromkeys(item for path in self.paths for factor in path.factors for item in factor.flat()))


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """One layer of the stack: it adds its branches to the residual stream.

    Attributes:
        index: Position in the order of execution, from 0.
        name: Module path of the block.
        branches: Every branch in the order of execution.
        verified: Whether the zero and the linear test passed: with every site multiplied by zero the block is the
            identity on the stream (up to its post-norms and constant factors), and the stream is affine in each site.
        evidence: How the block was found: ``"trace"``, ``"hints"``, and what the verification found where it failed.
        token_dims: Dimensions of the stream along which the block mixes positions, which is where its tokens stand:
            ``(1,)`` for ``(batch, tokens, width)``; empty where no branch mixes any.
    """

    index: int
    name: str
    branches: tuple[Branch, ...]
    verified: bool = False
    evidence: str = "trace"
    token_dims: tuple[int, ...] = ()

    @property
    def attention(self) -> Branch | None:
        """The first branch that moves information between tokens (its ``kind`` says whether it is attention)."""
        mixers = [branch for branch in self.branches if branch.kind in ("attention", "mixer")]
        return next((branch for branch in mixers if branch.kind == "attention"), mixers[0] if mixers else None)

    @property
    def mlp(self) -> Branch | None:
        """The first branch that acts on each token alone."""
        return next((branch for branch in self.branches if branch.kind == "mlp"), None)


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
        finite_differences: Whether some operation cannot be differentiated twice: then differences stand in for it.
    """

    frobenius_ratio: float | None = None
    update_ratio: float | None = None
    update_cosine: float | None = None
    mlp_gain_mean: float | None = None
    mlp_gain_deviation: float | None = None
    attention_gain_mean: float | None = None
    attention_gain_deviation: float | None = None
    finite_differences: bool = False


@dataclass(frozen=True, slots=True)
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
        functional: What the branches do as functions, ``None`` where no batch was looked at.
        token_residual: ‖X − 1x̄ᵀ‖_F / ‖X‖_F of the block's output, mean over sequences of a batch; 0 where all
            tokens have become one vector. ``None`` where no batch was looked at.
        typical_token_residual: The same without massive activations, the few tokens and dimensions that are more than
            100 times as large as the median: they hide a collapse of the other tokens, or look like one.
        effective_rank: Effective rank of the block's output, on squared singular values, of a few sequences.
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
    functional: FunctionalMeasurement | None = None
    token_residual: float | None = None
    typical_token_residual: float | None = None
    effective_rank: float | None = None

    @property
    def ratio(self) -> float | None:
        """The spectral ratio ‖MLP branch‖₂ / ‖attention branch‖₂, ``None`` unless both norms are positive."""
        if not self.mlp_norm or not self.attention_norm:
            return None
        return self.mlp_norm / self.attention_norm

    @property
    def log_ratio(self) -> float | None:
        """ln ρ, the quantity that everything averages, smooths and controls."""
        if not self.mlp_norm or not self.attention_norm:
            return None
        return math.log(self.mlp_norm) - math.log(self.attention_norm)

    @property
    def reason(self) -> str | None:
        """Why a norm or the ratio is missing, ``None`` where nothing is."""
        branches = (
            ("mlp", self.mlp_norm, self.mlp_reason),
            ("attention", self.attention_norm, self.attention_reason),
        )
        parts = [
            f"{word}: {reason or 'its norm is zero'}"
            for word, norm, reason in branches
            if reason is not None or norm == 0.0
        ]
        return "; ".join(parts) or None


@dataclass(frozen=True, slots=True, repr=False)
class Measurement:
    """The spectral norms of every block at one moment.

    Attributes:
        step: Optimizer step at which the measurement was taken.
        linearization: The rule that turned branches into linear operators. Never compare across rules.
        layers: One record per block, in the order of execution.
        safe_zone: The interval of ratios that the summary calls inside.
        seconds: Wall time of the measurement.
        adapters: The part of branches with adapters that was measured; see :func:`~lightning_spectral.measure`.
    """

    step: int
    linearization: Linearization
    layers: tuple[LayerMeasurement, ...]
    safe_zone: tuple[float, float] = (0.5, 2.0)
    seconds: float = field(default=0.0, compare=False)
    adapters: Literal["sum", "base", "delta"] = "sum"

    @property
    def has_zone(self) -> bool:
        """Whether the safe zone is about these ratios. Nobody has calibrated one for Jacobians, or for a difference."""
        return self.linearization != "jacobian" and self.adapters != "delta"

    def __iter__(self) -> Iterator[LayerMeasurement]:
        """Iterate over the layers."""
        return iter(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that ``json.dumps`` accepts, with the ratio and the reason of every layer."""
        layers = [asdict(layer) | {"ratio": layer.ratio, "reason": layer.reason} for layer in self.layers]
        return {
            "step": self.step,
            "linearization": self.linearization,
            "safe_zone": list(self.safe_zone),
            "seconds": self.seconds,
            "layers": layers,
        } | ({} if self.adapters == "sum" else {"adapters": self.adapters})

    def summary(self) -> dict[str, float]:
        """Return the summary values of the measurement, by the names they are logged under.

        Values that do not exist (a model without a single measurable ratio) are absent, never NaN.
        """
        ratios = {layer.index: layer.log_ratio for layer in self.layers if layer.log_ratio is not None}
        values: dict[str, float] = {}
        if ratios:
            low, high = math.log(self.safe_zone[0]), math.log(self.safe_zone[1])
            excess = {index: max(low - value, value - high) for index, value in ratios.items()}
            values["ratio_min"] = math.exp(min(ratios.values()))
            values["ratio_median"] = math.exp(median(ratios.values()))
            values["ratio_max"] = math.exp(max(ratios.values()))
            values["in_zone"] = sum(distance < 0 for distance in excess.values()) / len(ratios)
            values["worst_layer"] = float(max(excess, key=excess.__getitem__))
        for branch in ("mlp", "attention"):
            norms = [norm for layer in self.layers if (norm := getattr(layer, f"{branch}_norm")) is not None]
            if norms:
                values[f"{branch}_norm_max"] = max(norms)
        for quantity in ("token_residual", "effective_rank"):
            seen = [value for layer in self.layers if (value := getattr(layer, quantity)) is not None]
            if seen:
                values[f"{quantity}_min"] = min(seen)
        reasons = [reason for layer in self.layers for reason in (layer.mlp_reason, layer.attention_reason)]
        values["unmeasured"] = float(sum(reason is not None for reason in reasons))
        values["seconds"] = self.seconds
        return values

    def plot(self) -> Figure:
        """Draw both norms and the ratio of every block.

        Returns:
            A figure that belongs to no global state. Save it with ``figure.savefig(path)``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return profile_figure(self)

    def __str__(self) -> str:
        """Return a readable table, one line per block."""
        return measurement_table(self)

    def __repr__(self) -> str:
        """Return the same table: a measurement is looked at more often than it is evaluated."""
        return str(self)
