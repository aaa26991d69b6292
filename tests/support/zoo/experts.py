"""Mixtures of experts: as 3-D parameters and as module lists, with a router, shared experts and idle experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .example import HIDDEN, Example, blocks_of, seeded, token_inputs
from .fused import INNER, Gated, PerHead, PreNormBlock, attention_branch
from .gpt import BLOCKS, NanoGPT

EXPERTS, TOP = 4, 2


def route(router: nn.Linear, x: Tensor) -> Tensor:
    """Weights ``(tokens, experts)``, zero outside the best two."""
    scores, chosen = router(x).softmax(-1).topk(TOP, dim=-1)
    return torch.zeros(x.shape[0], EXPERTS).scatter(1, chosen, scores / scores.sum(-1, keepdim=True))


class Router(nn.Linear):
    """The router, biased so that the last expert is never chosen where that is asked for."""

    def __init__(self, idle: bool = False) -> None:
        super().__init__(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("penalty", torch.tensor([0.0] * (EXPERTS - 1) + [1e4 * idle]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return super().forward(x) - self.penalty


class OutIn(nn.Module):
    """Experts as parameters ``(experts, out, in)``, gate and up fused in halves; every expert sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

    def forward(self, x: Tensor) -> Tensor:
        """All experts at once, weighted."""
        tokens = x.flatten(0, 1)
        gate, up = torch.einsum("td,eid->eti", tokens, self.gate_up).chunk(2, dim=-1)
        y = torch.einsum("eti,edi->etd", F.silu(gate) * up, self.down)
        return torch.einsum("etd,te->td", y, route(self.router, tokens)).view_as(x)

    def matrices(self) -> list[Tensor]:
        """W_down · W_up of each expert."""
        return [down @ fused[INNER:] for down, fused in zip(self.down, self.gate_up, strict=True)]


class InOut(nn.Module):
    """Experts as parameters ``(experts, in, out)``, not gated, by batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """All experts at once, weighted."""
        tokens = x.flatten(0, 1)
        y = torch.bmm(F.gelu(torch.bmm(tokens.expand(EXPERTS, -1, -1), self.up)), self.down)
        return (y * route(self.router, tokens).T.unsqueeze(-1)).sum(0).view_as(x)

    def matrices(self) -> list[Tensor]:
        """W_down · W_up of each expert."""
        return [(up @ down).T for up, down in zip(self.up, self.down, strict=True)]


class LoopedOutIn(OutIn):
    """The same parameters; each expert sees only the tokens routed to it, and ``index_add_`` collects them."""

    def __init__(self, idle: bool = False) -> None:
        super().__init__()
        self.router = Router(idle)

    def forward(self, x: Tensor) -> Tensor:
        """Expert by expert."""
        tokens = x.flatten(0, 1)
        weights = route(self.router, tokens)
        y = torch.zeros_like(tokens)
        for e in weights.sum(0).nonzero().flatten().tolist():
            rows = weights[:, e].nonzero().flatten()
            gate, up = F.linear(tokens[rows], self.gate_up[e]).chunk(2, dim=-1)
            y.index_add_(0, rows, F.linear(F.silu(gate) * up, self.down[e]) * weights[rows, e, None])
        return y.view_as(x)


class ModuleExperts(nn.Module):
    """Experts as a module list; only the chosen ones run. Optionally one more that always runs."""

    def __init__(self, shared: bool = False, idle: bool = False) -> None:
        super().__init__()
        self.gate = Router(idle)
        self.experts = nn.ModuleList(Gated() for _ in range(EXPERTS))
        self.shared = Gated() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Expert by expert."""
        tokens = x.flatten(0, 1)
        weights = route(self.gate, tokens)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = weights[:, e].nonzero().flatten()
            if rows.numel():
                y[rows] = y[rows] + expert(tokens[rows]) * weights[rows, e, None]
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x)

    def matrices(self) -> list[Tensor]:
        """W_down · W_up of each expert, the shared one last."""
        experts = [*self.experts] + ([] if self.shared is None else [self.shared])
        return [expert.w2.weight @ expert.up() for expert in experts]


def matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """The matrices of every block of this module, one per expert."""
    return {
        f"{BLOCKS}.{i}": {
            "attention": [attention_branch(block.attention).detach()],
            "mlp": [matrix.detach() for matrix in block.feed_forward.matrices()],
        }
        for i, block in enumerate(model.get_submodule(BLOCKS))
    }


def members() -> list[Example]:
    """Every model of this module."""
    kinds: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "experts_out_in": (OutIn, "every expert sees every token"),
        "experts_in_out": (InOut, "every expert sees every token"),
        "experts_looped": (LoopedOutIn, "index_add_ of routed tokens"),
        "experts_looped_idle": (lambda: LoopedOutIn(idle=True), "the last expert is never chosen"),
        "experts_modules": (ModuleExperts, "masked writes of routed tokens"),
        "experts_modules_shared": (lambda: ModuleExperts(shared=True), "one more expert always runs"),
        "experts_modules_idle": (lambda: ModuleExperts(True, True), "the last routed expert never runs"),
    }
    return [
        Example(
            name=name,
            build=seeded(lambda mlp=mlp: NanoGPT(lambda: PreNormBlock(PerHead, mlp), layers=2)),  # type: ignore[misc]
            inputs=token_inputs,
            blocks=blocks_of(BLOCKS, range(2), ("attention", "attention.wo"), "feed_forward"),
            matrices=matrices,
            note=note,
        )
        for name, (mlp, note) in kinds.items()
    ]
