"""Models whose weights are tensors of a class of their own, as libraries of quantization make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.gpt import NanoGPT

from lightning_spectral import find_blocks, measure
from lightning_spectral.errors import BlocksNotFoundError


class Int8(Tensor):
    """Rows of integers and one scale for each; it knows no operation but the linear layer."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Int8:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)  # type: ignore[attr-defined]
        made.codes, made.scales = codes, scales
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Int8:
        return Int8(inner["codes"], inner["scales"])

    def dequantize(self) -> Tensor:
        return self.codes * self.scales

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].dequantize(), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].codes, args[0].scales)
        raise NotImplementedError(f"unimplemented: {func}")


def quantized(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scales).round().to(torch.int8)
            layer.weight = nn.Parameter(Int8(codes, scales), requires_grad=False)
    return model


def test_a_quantized_model_is_told_to_be_one():
    with pytest.raises(
        BlocksNotFoundError, match=r"of a quantized model: .*weight is a .*Int8\. Look at the model before"
    ):
        find_blocks(quantized(NanoGPT(layers=2)))


def test_weights_that_are_quantized_after_the_search_have_a_reason():
    model = NanoGPT(layers=2)
    blocks = find_blocks(model)
    for layer in measure(quantized(model), blocks):
        assert (layer.ratio, layer.mlp_norm, layer.attention_norm) == (None, None, None)
        assert "weight is quantized: Int8 is no matrix of numbers" in layer.reason
