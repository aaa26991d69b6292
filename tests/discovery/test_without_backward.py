"""Kernels that refuse to run where their backward pass would be needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_spectral import find_blocks, measure

WIDTH, HEADS, TOKENS = 32, 4, 16


class Flexible(nn.Module):
    """Attention by the flexible kernel of torch, which refuses inputs that require gradients on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=causal(q.device))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.mixed(q, k, v).transpose(1, 2).flatten(2))


class ForInference(Flexible):
    """Attention that is written for inference alone."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("this kernel has no backward pass")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal(device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, TOKENS, TOKENS, device=device)


class Block(nn.Module):
    def __init__(self, attention: type[Flexible]) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Sequential):
    def __init__(self, attention: type[Flexible]) -> None:
        super().__init__(nn.Embedding(50, WIDTH), Block(attention), Block(attention), nn.Linear(WIDTH, 50))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", [Flexible, ForInference])
def test_a_kernel_without_a_backward_pass_is_recorded_without_grad(attention: type[Flexible]):
    torch.manual_seed(0)
    model, ids = Model(attention), torch.randint(0, 50, (2, TOKENS))
    with pytest.raises(NotImplementedError, match=r"backward"):
        model(ids)
    blocks = find_blocks(model, batch=ids)
    assert [(block.name, block.verified) for block in blocks] == [("1", True), ("2", True)]
    for own, layer in zip((model[1], model[2]), measure(model, blocks), strict=True):
        value = own.attention.qkv.weight[2 * WIDTH :]
        expected = torch.linalg.matrix_norm(own.attention.out.weight @ value @ own.norm1.weight.diag(), 2)
        assert layer.attention_norm == pytest.approx(expected.item(), rel=1e-5)
    assert find_blocks(model.to("meta"), batch=ids) == blocks
