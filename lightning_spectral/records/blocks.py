"""What is known of a model: its blocks, their branches, and the factors of these, as names and layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lightning_spectral.records.text import Table, Tabular

__all__ = [
    "Alternative",
    "Blocks",
    "Branch",
    "BranchKind",
    "End",
    "Factor",
    "FactorRole",
    "Path",
    "Projection",
    "ResidualBlock",
    "Scores",
    "StreamAt",
    "alternatives",
]

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
        shape: Shape of the stored parameter in the model that the block was found in, ``None`` where it is not known.
    """

    role: FactorRole
    parameter: str | None
    layout: tuple[tuple[Any, ...], ...] = ()
    rows: tuple[range, ...] | None = None
    constant: float = 1.0
    size: int | None = None
    adapters: tuple[tuple[Factor, ...], ...] = ()
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    def flat(self) -> Iterator[Factor]:
        """Yield the factor and those of its adapters."""
        yield self
        yield from (factor for chain in self.adapters for factor in chain)


@dataclass(frozen=True, slots=True)
class Path:
    """One chain of factors from the site back to the residual stream, the factor nearest the site first.

    The paths of a branch with one ``expert`` are added up: the operator of a dense branch is the sum over its paths.

    Attributes:
        factors: The chain, in the order of the matrix product.
        expert: The expert in a mixture of experts, ``"shared"`` for what is always active, else ``None``.
    """

    factors: tuple[Factor, ...]
    expert: int | str | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """How the queries, or the keys, of attention are made of the stream.

    Attributes:
        factors: The matrix, and the multipliers and gains in front of it up to the last norm; the gain alone where a
            norm stands behind the matrix (QK-norm), nothing where that norm has no gain.
        size: ‖q‖₂ of one head per unit of the gain, where a norm stands behind the matrix; else ``None``.
    """

    factors: tuple[Factor, ...]
    size: float | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """How the logits of attention are made: scale · ⟨q, k⟩ of every head, its positions turned where it has rotations.

    Attributes:
        query: How the queries are made.
        key: How the keys are made.
        heads: The first row of each head in the matrix of the queries, and in that of the keys; each pair once.
        width: Rows of a head.
        scale: The number that multiplies ⟨q, k⟩.
        rotated: Whether something that preserves norms, such as rotary position codes, stands behind a matrix.
    """

    query: Projection
    key: Projection
    heads: tuple[tuple[int, int], ...]
    width: int
    scale: float
    rotated: bool


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
        paths: The linear chains of the branch: one for most dense branches, one per expert for a mixture of experts,
            none where no weight linearization exists.
        reason: Why there is no weight linearization, ``None`` where there is one.
        ends: The parameters (weights and biases, or gain and bias of a norm behind them) that have to be scaled to
            scale the branch: its output is homogeneous of degree one in them together, and nothing else uses them.
        ends_reason: Why there are no such parameters, ``None`` where there are.
        scores: How the logits of attention are made; empty where it is not known. Not part of the plain values.
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
    scores: tuple[Scores, ...] = field(default=(), compare=False)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Every distinct factor of the branch, the one nearest the site first, each matrix before its adapters."""
        return tuple(dict.fromkeys(item for path in self.paths for factor in path.factors for item in factor.flat()))


class Alternative(NamedTuple):
    """What acts on one token: paths that are added up.

    Attributes:
        expert: The expert among them, as in :class:`Path`.
        paths: The paths.
    """

    expert: int | str | None
    paths: tuple[Path, ...]


def alternatives(branches: Sequence[Branch]) -> tuple[Alternative, ...]:
    """Return what the branches of one kind can do to a token: their sum, once for every expert of a mixture.

    The norm of a kind is the largest norm of an alternative. For branches that run one after another, the sum of their
    operators is what they do to first order in the branches.

    Raises:
        ValueError: Several of the branches are mixtures, so that their experts meet in too many ways.
    """
    options = [_options(branch) for branch in branches]
    if sum(len(option) > 1 for option in options) > 1:
        raise ValueError(
            "several of its branches are mixtures of experts, or experts of one that no module adds up: their sums are "
            "not known"
        )
    return tuple(
        Alternative(
            next((item.expert for item in chosen if item.expert is not None), None),
            tuple(path for item in chosen for path in item.paths),
        )
        for chosen in itertools.product(*options)
    )


def _options(branch: Branch) -> list[Alternative]:
    found: dict[int | str | None, list[Path]] = {}
    for path in branch.paths:
        found.setdefault(path.expert, []).append(path)
    return [Alternative(expert, tuple(paths)) for expert, paths in found.items()]


@dataclass(frozen=True, slots=True)
class StreamAt:
    """Where a stream is heard: in what a module returns, or in what it takes.

    Attributes:
        module: Path of the module; ``None`` where no module returns or takes the stream.
        taken: Whether the stream is the first tensor among its arguments, instead of in its result.
    """

    module: str | None
    taken: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class ResidualBlock:
    """One layer of the stack: it adds its branches to the residual stream.

    Attributes:
        index: Position in the order of execution, from 0.
        name: Module path of the block. Where no module is around its branches and no other's: what is around each of
            them, joined by ``" + "``; for a block on one of several streams, its first and its last branch.
        branches: Every branch in the order of execution.
        verified: Whether the zero and the linear test passed: with every site multiplied by zero the block passes the
            stream on (up to its norms, constant factors, and what is added that does not come from this stream), and
            the stream is affine in each site.
        evidence: How the block was found: ``"trace"``, ``"hints"``, and what the verification found where it failed.
        token_dims: Dimensions of the stream along which the block mixes positions, which is where its tokens stand:
            ``(1,)`` for ``(batch, tokens, width)``; empty where no branch mixes any.
        stream: Where the stream behind the block is heard; ``None`` for a block that no pass was recorded of.

    Example:
        >>> find_blocks(model)[0]
        ResidualBlock(0, 'transformer.h.0', attention='transformer.h.0.attn', mlp='transformer.h.0.mlp', verified=True)
    """

    index: int
    name: str
    branches: tuple[Branch, ...]
    verified: bool = False
    evidence: str = "trace"
    token_dims: tuple[int, ...] = ()
    stream: StreamAt | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Return the index, the name and the sites."""
        sites = "".join(f", {branch.kind}={branch.site!r}" for branch in self.branches)
        return f"ResidualBlock({self.index}, {self.name!r}{sites}, verified={self.verified})"

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules in the name, of which there are several where the block is a pair of modules."""
        return tuple(self.name.split(" + "))

    @property
    def doubt(self) -> str | None:
        """What failed in the self-check, ``None`` where it passed."""
        if self.verified:
            return None
        return self.evidence.removeprefix("trace; not verified: ").replace("hints", "described by hints, not checked")

    @property
    def kinds(self) -> tuple[BranchKind, ...]:
        """The kinds of its branches, each once. A kind adds to the stream by the sum of its branches."""
        return tuple(dict.fromkeys(branch.kind for branch in self.branches))

    @property
    def attention_branches(self) -> tuple[Branch, ...]:
        """The branches that make up the attention by their sum; other token mixers where nothing attends."""
        attention = tuple(branch for branch in self.branches if branch.kind == "attention")
        return attention or tuple(branch for branch in self.branches if branch.kind == "mixer")

    @property
    def mlp_branches(self) -> tuple[Branch, ...]:
        """The branches that make up the MLP by their sum. They act on each token alone."""
        return tuple(branch for branch in self.branches if branch.kind == "mlp")

    @property
    def attention(self) -> Branch | None:
        """The first branch that moves information between tokens (its ``kind`` says whether it is attention)."""
        return next(iter(self.attention_branches), None)

    @property
    def mlp(self) -> Branch | None:
        """The first branch that acts on each token alone."""
        return next(iter(self.mlp_branches), None)


class Blocks(Tabular, tuple[ResidualBlock, ...]):
    """The residual blocks of a model in the order of execution: a tuple that prints as a table.

    Attributes:
        notes: What was not looked at.
    """

    notes: tuple[str, ...]

    def __new__(cls, blocks: Iterable[ResidualBlock] = (), notes: Iterable[str] = ()) -> Blocks:
        """Hold some blocks, which compare equal to a tuple of them."""
        self = super().__new__(cls, blocks)
        self.notes = tuple(notes)
        return self

    def __getnewargs__(self) -> tuple[tuple[ResidualBlock, ...], tuple[str, ...]]:
        """Return what a copy is made of."""
        return tuple(self), self.notes

    def _table(self) -> Table:
        rows = [[str(block.index), block.name, *_sites(block), block.doubt or "verified"] for block in self]
        columns = [">4", "<block", "<attention", "<mlp", "<others", "<self-check"]
        if not any(others for *_, others, _ in rows):  # as in most models
            columns, *rows = ([*row[:4], row[5]] for row in (columns, *rows))
        return Table(f"{len(self)} residual blocks", columns, rows, [f"note: {note}" for note in self.notes])


def _sites(block: ResidualBlock) -> tuple[str, str, str]:
    """Return the sites of the attention, of the MLP and of other branches, as seen from the block."""
    groups: dict[str, list[str]] = {"attention": [], "mlp": [], "others": []}
    for branch in block.branches:
        site = branch.site.removeprefix(f"{block.name}.") or "(itself)"
        if branch.kind in groups:
            groups[branch.kind].append(site)
        else:
            groups["others"].append(f"{branch.kind}: {site}")
    attention, mlp, others = (", ".join(sites) for sites in groups.values())
    return attention or "-", mlp or "-", others
