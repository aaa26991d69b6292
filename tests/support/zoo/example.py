"""What one member of the zoo is: a tiny model, example inputs and the truth about its residual branches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Sites = tuple[str, ...]
NormScheme = Literal["pre", "post", "sandwich", "branchpost", "par", "none", "after_norm"]

HIDDEN = 32
HEADS = 4
VOCABULARY = 61
BATCH = 2
TOKENS = 11
SOURCE_TOKENS = 13


@dataclass(frozen=True)
class ExpectedBlock:
    """The truth about one residual block.

    Attributes:
        name: Module path of the block, ``""`` where the model itself is the block; of several modules, ``"a + b"``.
        attention: Acceptable absolute sites of the token mixer, the preferred one first; ``None`` without such a
            branch, ``"param:<path>"`` where no module carries it.
        mlp: The same for the branch that acts on each token alone.
        other: The same for every further branch, in order of execution.
        kinds: Acceptable kinds of ``attention``: two of them where the words do not decide (linear attention).
        mlp_kinds: Acceptable kinds of ``mlp``: two of them where a token shift or a convolution hides inside.
        other_kinds: Kind of every further branch.
        calls: How often one forward of the model runs the block.
        verified: Whether the self-check of the block passes; not where a bias is added to a branch at zero.
        whole: Whether the module takes and returns the stream; not where it also makes the stream that it adds to.
    """

    name: str
    attention: Sites | None = None
    mlp: Sites | None = None
    other: tuple[Sites, ...] = ()
    kinds: tuple[str, ...] = ("attention",)
    mlp_kinds: tuple[str, ...] = ("mlp",)
    other_kinds: tuple[str, ...] = ()
    calls: int = 1
    verified: bool = True
    whole: bool = True

    @property
    def modules(self) -> list[str]:
        """The paths of the modules that are the block."""
        return self.name.split(" + ")

    @property
    def branches(self) -> tuple[Sites, ...]:
        """The acceptable sites of every branch."""
        return tuple(sites for sites in (self.attention, self.mlp, *self.other) if sites is not None)


@dataclass(frozen=True)
class Example:
    """One tiny model with its known truth.

    Attributes:
        name: Unique name.
        build: Builds the model: seeded, on the CPU, in eval mode.
        inputs: Example arguments and keyword arguments for a model that ``build`` made, seeded.
        blocks: Every residual block, in order of execution.
        norm_scheme: Where the norms stand: ``"pre"``, ``"post"`` (behind the add), ``"sandwich"`` (before and behind
            the branch), ``"branchpost"`` (only behind the branch), ``"par"`` (parallel branches behind a pre-norm),
            ``"none"``, ``"after_norm"`` (the residual itself is taken behind the norm).
        identity: Whether zeroed sites turn every block into the identity, exactly.
        expected_refusal: Whether discovery has to raise instead of reporting blocks.
        matrices: Weight matrices of the branches, by block name and then ``"attention"`` or ``"mlp"``: the product
            ``W_o · W_v`` or ``W_down · W_up``, one per expert (a dense branch has one), without norms and multipliers.
        operators: What each kind does in a block, by block name and then ``"attention"`` or ``"mlp"``: gains and
            multipliers included, and all branches of a kind added up.
        callable: Whether the model itself can be called with the inputs (a LightningModule without forward cannot).
        compiled: Whether ``torch.compile`` is involved.
        needs_process_group: Whether ``torch.distributed`` has to be initialized before ``build``.
        survey: Whether the model is an entry of ``tests/data/architectures.json``.
        note: What is special about it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    blocks: tuple[ExpectedBlock, ...] = ()
    norm_scheme: NormScheme = "pre"
    identity: bool = True
    expected_refusal: bool = False
    matrices: Callable[[nn.Module], Mapping[str, Mapping[str, list[Tensor]]]] | None = field(default=None, repr=False)
    operators: Callable[[Any], Mapping[str, Mapping[str, Tensor]]] | None = field(default=None, repr=False)
    callable: bool = True
    compiled: bool = False
    needs_process_group: bool = False
    survey: bool = False
    note: str = ""


def seeded(build: Callable[[], nn.Module], *, seed: int = 0, randomize: bool = True) -> Callable[[], nn.Module]:
    """Return ``build`` with a seed of its own, informative weights and eval mode; the global RNG is left alone."""

    @functools.wraps(build)
    def wrapped() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
            if randomize:
                randomize_(model)
        return model.eval()

    return wrapped


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Draw weights that make every branch matter; vectors keep their convention (around 1 or 0) but are perturbed."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif id(parameter) in embeddings:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, 0.9 / math.sqrt(max(parameter.shape[-2:])))


def tokens(*shape: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Return random token ids above the usual special ones."""
    return torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal floats."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_inputs(model: nn.Module) -> Inputs:
    """Token ids, as the first positional argument."""
    return (tokens(BATCH, TOKENS),), {}


def float_inputs(model: nn.Module) -> Inputs:
    """Token vectors, as the first positional argument."""
    return (floats(BATCH, TOKENS, HIDDEN),), {}


def blocks_of(
    container: str,
    indices: range | tuple[int, ...],
    attention: str | tuple[str, ...] | None,
    mlp: str | tuple[str, ...] | None,
    other: tuple[str | tuple[str, ...], ...] = (),
    **flags: Any,
) -> tuple[ExpectedBlock, ...]:
    """Return one expected block per index of a container; sites are relative to the block."""

    def absolute(block: str, sites: str | tuple[str, ...]) -> Sites:
        return tuple(join(block, site) for site in ((sites,) if isinstance(sites, str) else sites))

    return tuple(
        ExpectedBlock(
            name=block,
            attention=None if attention is None else absolute(block, attention),
            mlp=None if mlp is None else absolute(block, mlp),
            other=tuple(absolute(block, sites) for sites in other),
            **flags,
        )
        for block in (join(container, str(index)) for index in indices)
    )


def pairs(blocks: Sequence[ExpectedBlock]) -> tuple[ExpectedBlock, ...]:
    """Return every two neighbours with one branch each as the block that they are together."""
    return tuple(
        replace(
            first,
            name=f"{first.name} + {second.name}",
            attention=first.attention or second.attention,
            mlp=first.mlp or second.mlp,
            kinds=first.kinds if first.attention else second.kinds,
            whole=False,
        )
        for first, second in zip(blocks[::2], blocks[1::2], strict=True)
    )


def join(block: str, site: str) -> str:
    """Return the absolute path of a site; ``"attn[0]"`` is element 0 of what ``"attn"`` returns."""
    site = site.split("[")[0]
    if site.startswith("param:"):
        return f"param:{join(block, site.removeprefix('param:'))}"
    return f"{block}.{site}" if block else site
