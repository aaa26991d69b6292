"""Low-rank adapters beside the weights of a model, as people write them and as fine-tuning libraries lay them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrangements import Embedded, Loop
from .example import HEADS, HIDDEN, Example, blocks_of, seeded, token_inputs

RANK, SCALE = 3, 2.0
GROUPS = 2


class Adapted(nn.Module):
    """A frozen linear layer and named adapters, nested as fine-tuning libraries nest them."""

    def __init__(self, base: nn.Linear, dropout: float = 0.1) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, base.out_features, bias=False)})
        self.scaling = {"default": SCALE}

    def forward(self, x: Tensor) -> Tensor:
        """The sum, in the dtype of the base."""
        result = self.base_layer(x)
        dtype = result.dtype
        for name, A in self.lora_A.items():
            x = x.to(A.weight.dtype)
            result = result + self.lora_B[name](A(self.lora_dropout[name](x))) * self.scaling[name]
        return result.to(dtype)

    def merged(self) -> nn.Linear:
        """The base with the adapters in its weight."""
        base = self.base_layer
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None).to(base.weight)
        linear.load_state_dict(base.state_dict())
        with torch.no_grad():
            for name, A in self.lora_A.items():
                product = self.lora_B[name].weight.to(linear.weight) @ A.weight.to(linear.weight)
                linear.weight += self.scaling[name] * product
        return linear


class GroupedAttention(nn.Module):
    """Separate projections, and fewer heads for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, HIDDEN // GROUPS), nn.Linear(HIDDEN, HIDDEN // GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        q, k, v = (y.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        k, v = (y.repeat_interleave(GROUPS, dim=1) for y in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """An MLP with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*sizes) for sizes in ((HIDDEN, 48), (HIDDEN, 48), (48, HIDDEN)))

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token alone."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GatedBlock(nn.Module):
    """A pre-norm block of both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attn, self.mlp = GroupedAttention(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def plain() -> nn.Module:
    """Three blocks without adapters."""
    return Embedded(Loop([GatedBlock() for _ in range(3)]))


def each_linear(model: nn.Module, replace: Callable[[nn.Module], nn.Module], kind: type[nn.Module]) -> nn.Module:
    """Replace every layer of a kind inside the branches, in place."""
    for owner in [module for module in model.modules() if isinstance(module, (GroupedAttention, Gated))]:
        for name, layer in list(owner.named_children()):
            if isinstance(layer, kind):
                setattr(owner, name, replace(layer))
    return model


def adapted() -> nn.Module:
    """Adapters on every projection of three frozen blocks."""
    return each_linear(plain().requires_grad_(False), Adapted, nn.Linear)


def merged(model: nn.Module) -> nn.Module:
    """The same model with the adapters in its weights, in place."""
    return each_linear(model, lambda layer: layer.merged(), Adapted)


def matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """W_o · W_v and W_down · W_up of merged weights, heads repeated."""
    heads = torch.arange(HIDDEN // GROUPS).view(-1, HIDDEN // HEADS).repeat_interleave(GROUPS, 0).flatten()

    def weights(*layers: Adapted) -> Iterator[Tensor]:
        yield from (layer.merged().weight.detach() for layer in layers)

    found = {}
    for i, block in enumerate(model.get_submodule("body.layers")):
        o, v, down, up = weights(block.attn.o, block.attn.v, block.mlp.down, block.mlp.up)
        found[f"body.layers.{i}"] = {"attention": [o @ v[heads]], "mlp": [down @ up]}
    return found


def members() -> list[Example]:
    """Every model of this module."""
    return [
        Example(
            "adapters_on_every_projection",
            seeded(adapted),
            token_inputs,
            blocks_of("body.layers", range(3), ("attn", "attn.o"), ("mlp", "mlp.down")),
            matrices=matrices,
            note="an add inside every linear layer, with dropout and casts",
        )
    ]
