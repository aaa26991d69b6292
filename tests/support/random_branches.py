"""Random small branches, each with the matrix that is left of it when activations and gates are left out.

A part maps ``(batch, tokens, width)`` to another width, and knows what it does to a matrix M that stands right of it:
a product multiplies, an activation does nothing, a norm multiplies by its gain and divides by the expected size of M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS = 8, 2


class Part(nn.Module):
    """A piece of a branch."""

    def matrix(self, M: Tensor) -> Tensor:
        """What the piece does to a matrix."""
        raise NotImplementedError


class Linear(Part):
    """A product, with its weight stored and applied in one of many ways."""

    WAYS = ("linear", "bias", "transposed", "einsum", "rows", "shuffled", "conv", "batched", "head")

    def __init__(self, way: str, n: int, m: int) -> None:
        super().__init__()
        self.way, self.m = way, m
        shapes = {"transposed": (n, m), "rows": (3 * m, n), "batched": (1, n, m), "conv": (m, n, 1)}
        self.weight = nn.Parameter(torch.randn(shapes.get(way, (m, n))) / math.sqrt(n))
        if way == "bias":
            self.bias = nn.Parameter(torch.randn(m))
        if way == "shuffled":
            self.register_buffer("order", torch.randperm(m))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        match self.way:
            case "bias":
                return F.linear(x, self.weight, self.bias)
            case "transposed":
                return x @ self.weight
            case "einsum":
                return torch.einsum("...i,oi->...o", x, self.weight)
            case "rows":
                return F.linear(x, self.weight)[..., self.m : 2 * self.m]
            case "shuffled":
                return F.linear(x, self.weight)[..., self.order]
            case "conv":
                return F.conv1d(x.transpose(1, 2), self.weight).transpose(1, 2)
            case "batched":
                return torch.bmm(x, self.weight.expand(len(x), -1, -1))
            case "head":
                return F.linear(x, self.weight).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return F.linear(x, self.weight)

    def matrix(self, M: Tensor) -> Tensor:
        """W M."""
        weight = self.weight.detach().double()
        match self.way:
            case "transposed":
                weight = weight.T
            case "rows":
                weight = weight[self.m : 2 * self.m]
            case "shuffled":
                weight = weight[self.order]
            case "conv":
                weight = weight[..., 0]
            case "batched":
                weight = weight[0].T
            case "head":
                weight = weight[torch.arange(self.m).view(2, -1).T.flatten()]
        return weight @ M


class Norm(Part):
    """A norm: fused, written out, by the length, or tanh in place of one."""

    WAYS = ("layer", "rms", "written", "length", "offset", "dyt")

    def __init__(self, way: str, n: int) -> None:
        super().__init__()
        self.way, self.n = way, n
        self.gain = nn.Parameter(0.5 + torch.rand(n))
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        match self.way:
            case "layer":
                return F.layer_norm(x, (self.n,), self.gain)
            case "written":
                return self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12))
            case "length":
                return F.normalize(x, dim=-1) * math.sqrt(self.n) * self.gain
            case "offset":
                return F.rms_norm(x, (self.n,)) * (1 + self.gain)
            case "dyt":
                return self.gain * torch.tanh(self.slope * x)
        return F.rms_norm(x, (self.n,), self.gain)

    def matrix(self, M: Tensor) -> Tensor:
        """diag(γ) M, at mean square 1 per channel where it is a norm and stands behind a matrix."""
        gain = self.gain.detach().double()[:, None]
        if self.way == "dyt":
            return gain * float(self.slope.detach()) * M
        gain = gain + 1 if self.way == "offset" else gain
        unit = torch.equal(M, M[0, 0] * torch.eye(*M.shape, dtype=M.dtype)) if M.shape[0] == M.shape[1] else False
        return gain * (M / M[0, 0] if unit else M * math.sqrt(len(M)) / torch.linalg.matrix_norm(M))


class Activation(Part):
    """An activation, fused or written out in several operations."""

    WAYS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu written": lambda x: 0.5 * (x * (1 + torch.erf(x / math.sqrt(2)))),
        "squared": lambda x: F.relu(x) * F.relu(x),
        "where": lambda x: torch.where(x > 0, x, 0.1 * x),
        "masked": lambda x: x.masked_fill(x < 0, 0.0),
        "hard": lambda x: x * F.relu6(x + 3) / 6,
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return self.WAYS[self.way](x)

    def matrix(self, M: Tensor) -> Tensor:
        """M."""
        return M


class Gain(Part):
    """What multiplies: a gain per channel, a learned number, a constant, a minus sign, a gain per head."""

    WAYS = ("channels", "number", "constant", "minus", "heads", "divisor", "exp")

    def __init__(self, way: str, n: int) -> None:
        super().__init__()
        self.way, self.n = way, n
        shape = {"channels": (n,), "heads": (2, 1), "divisor": (n,)}.get(way, ())
        self.gain = nn.Parameter(0.5 + torch.rand(shape))

    def _factor(self) -> Tensor:
        match self.way:
            case "constant":
                return torch.tensor(1.5)
            case "minus":
                return torch.tensor(-1.0)
            case "heads":
                return self.gain.expand(2, self.n // 2).flatten()
            case "divisor":
                return 1 / self.gain
            case "exp":
                return self.gain.exp()
        return self.gain

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        match self.way:
            case "constant":
                return 1.5 * x
            case "minus":
                return -x
            case "heads":
                return (x.unflatten(-1, (2, -1)) * self.gain).flatten(-2)
            case "divisor":
                return x / self.gain
        return x * self._factor()

    def matrix(self, M: Tensor) -> Tensor:
        """diag(g) M."""
        factor = self._factor().detach().double()
        return (factor[:, None] if factor.ndim else factor) * M


class Move(Part):
    """Data movement."""

    WAYS = ("reverse", "roll", "halves", "inner", "shuffle", "rows")

    def __init__(self, way: str, n: int) -> None:
        super().__init__()
        self.way, self.n = way, n
        self.register_buffer("order", torch.randperm(n))

    def forward(self, x: Tensor) -> Tensor:
        """Move."""
        match self.way:
            case "roll":
                return x.roll(1, -1)
            case "halves":
                first, second = x.chunk(2, -1)
                return torch.cat([second, first], -1)
            case "inner":
                return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            case "shuffle":
                return x[..., self.order]
            case "rows":
                return x.flatten(0, 1).view(x.shape)
        return x.flip(-1)

    def matrix(self, M: Tensor) -> Tensor:
        """The same to the rows of M."""
        return self(M.T[None])[0].T


class Chain(Part):
    """One behind the other."""

    def __init__(self, *parts: Part) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """All in order."""
        for part in self.parts:
            x = part(x)
        return x

    def matrix(self, M: Tensor) -> Tensor:
        """All in order."""
        for part in self.parts:
            M = part.matrix(M)
        return M


class Sum(Part):
    """Added up, subtracted, averaged or added twice."""

    WAYS: ClassVar[dict[str, Callable[[list[Tensor]], Tensor]]] = {
        "plus": lambda parts: sum(parts[1:], parts[0]),
        "minus": lambda parts: parts[0] - parts[-1],
        "mean": lambda parts: torch.stack(parts).mean(0),
        "twice": lambda parts: parts[0] + parts[0] + parts[-1],
        "alpha": lambda parts: torch.add(parts[0], parts[-1], alpha=0.5),
    }

    def __init__(self, way: str, *parts: Part) -> None:
        super().__init__()
        self.way, self.parts = way, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Add up."""
        return self.WAYS[self.way]([part(x) for part in self.parts])

    def matrix(self, M: Tensor) -> Tensor:
        """Add up."""
        return self.WAYS[self.way]([part.matrix(M) for part in self.parts])


class Gate(Part):
    """One part, gated by another one."""

    def __init__(self, value: Part, gate: Part) -> None:
        super().__init__()
        self.value, self.gate = value, gate

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        return F.silu(self.gate(x)) * self.value(x)

    def matrix(self, M: Tensor) -> Tensor:
        """That of what is gated."""
        return self.value.matrix(M)


class Heads(Part):
    """Parts side by side."""

    def __init__(self, *parts: Part) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Side by side."""
        return torch.cat([part(x) for part in self.parts], -1)

    def matrix(self, M: Tensor) -> Tensor:
        """Side by side."""
        return torch.cat([part.matrix(M) for part in self.parts])


class Attention(Part):
    """Heads that mix tokens, with a fused kernel or written out."""

    def __init__(self, value: Part, n: int, fused: bool) -> None:
        super().__init__()
        self.value, self.fused = value, fused
        self.query, self.key = nn.Linear(WIDTH, n), nn.Linear(WIDTH, n)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)

    def matrix(self, M: Tensor) -> Tensor:
        """That of the values."""
        return self.value.matrix(M)


class Block(nn.Module):
    """A residual block of one branch, or of several that are run one after another."""

    def __init__(self, branches: Sequence[Part]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branches."""
        for branch in self.branches:
            x = x + branch(x)
        return x


def _one(draw: Any, kind: type, *arguments: Any) -> Any:
    return kind(draw(st.sampled_from(list(kind.WAYS))), *arguments)


def _bits(draw: Any, n: int, *, most: int = 2, straight: bool = False) -> list[Part]:
    """Pieces that keep the width."""
    kinds = draw(
        st.lists(st.sampled_from(["gain", "move"] if straight else ["gain", "move", "activation"]), max_size=most)
    )
    make = {
        "activation": lambda: _one(draw, Activation),
        "gain": lambda: _one(draw, Gain, n),
        "move": lambda: _one(draw, Move, n),
    }
    return [make[kind]() for kind in kinds]


def _inner(draw: Any, n: int, depth: int) -> Part:
    """A piece from the width of the stream to n."""
    kind = draw(st.sampled_from(["linear", "linear", "gate", "sum", "heads"] if depth else ["linear"]))
    if kind == "gate":
        # What is gated is linear, or nothing in the program would tell it from the gate.
        value = Chain(_one(draw, Linear, WIDTH, n), *_bits(draw, n, straight=True))
        part: Part = Gate(value, _inner(draw, n, depth - 1))
    elif kind == "sum":
        part = _one(draw, Sum, _inner(draw, n, depth - 1), _inner(draw, n, depth - 1))
    elif kind == "heads":
        part = Heads(_inner(draw, n // 2, depth - 1), _inner(draw, n // 2, depth - 1))
    else:
        part = _one(draw, Linear, WIDTH, n)
    return Chain(part, *_bits(draw, n))


def _branch(draw: Any, attends: bool) -> Part:
    n = draw(st.sampled_from([8, 16]))
    parts: list[Part] = []
    if draw(st.booleans()):
        parts.append(_one(draw, Norm, WIDTH))
    inner = _inner(draw, n, draw(st.integers(0, 2)))
    parts.append(Attention(inner, n, draw(st.booleans())) if attends else inner)
    if not attends:
        parts.append(_one(draw, Activation))
    if draw(st.integers(0, 4)) == 0:
        parts.append(_one(draw, Norm, n))
    parts += [_one(draw, Linear, n, WIDTH), *_bits(draw, WIDTH, most=1)]
    if draw(st.integers(0, 4)) == 0:
        parts.append(_one(draw, Norm, WIDTH))
    return Chain(*parts)


class Body(nn.Module):
    """A stack of one block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        for block in self.blocks:
            x = block(x)
        return x

    def norms(self) -> dict[str, float]:
        """The exact norms of what attention and MLP are, by the name of the field of a measurement."""
        found = {}
        for name, attends in (("attention_norm", True), ("mlp_norm", False)):
            branches = [branch for branch in self.blocks[0].branches if _attends(branch) == attends]
            if branches:
                whole = sum(branch.matrix(torch.eye(WIDTH, dtype=torch.float64)) for branch in branches)
                found[name] = float(torch.linalg.matrix_norm(whole, 2))
        return found


def _attends(branch: nn.Module) -> bool:
    return any(isinstance(part, Attention) for part in branch.modules())


@st.composite
def bodies(draw: Any) -> Body:
    """A block with an attention branch, an MLP branch or both, perhaps with two of a kind."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kinds = draw(st.sampled_from([[True, False], [False], [True], [False, True], [True, False, False]]))
    return Body(Block([_branch(draw, attends) for attends in kinds])).eval()
