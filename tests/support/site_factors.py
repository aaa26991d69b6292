"""Branches of a model multiplied at their sites, from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_spectral.records import Branch


def times(output: Any, index: int | str | None, factor: float) -> Any:
    """What a module returns, with the branch in it multiplied; everything else is the very same object."""
    if index is None:
        assert isinstance(output, Tensor)
        return output * factor
    if isinstance(output, (tuple, list)):
        return type(output)([item * factor if place == index else item for place, item in enumerate(output)])
    output[index] = output[index] * factor
    return output


@contextmanager
def scaled(model: nn.Module, factors: Mapping[Branch, float]) -> Iterator[list[str]]:
    """Multiply the branches at their sites; yields the sites in the order in which they fire."""
    fired: list[str] = []
    handles = []
    weights: dict[Tensor, Tensor] = {}

    def hook(branch: Branch) -> Any:
        def scale(module: nn.Module, args: Any, output: Any) -> Any:
            fired.append(branch.site)
            return times(output, branch.output_index, factors[branch])

        return scale

    for branch in factors:
        if branch.site.startswith("param:"):
            weight = model.get_parameter(branch.site.removeprefix("param:"))
            weights[weight] = weight.detach().clone()
            weight.data.mul_(factors[branch])
        else:
            handles.append(model.get_submodule(branch.site).register_forward_hook(hook(branch)))
    try:
        yield fired
    finally:
        for handle in handles:
            handle.remove()
        for weight, before in weights.items():
            weight.data.copy_(before)
