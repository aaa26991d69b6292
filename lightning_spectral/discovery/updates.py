"""How what the two branches of a block add to the residual stream compares, in passes that run anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.discovery.paths import module_at
from lightning_spectral.records import Branch, ResidualBlock

__all__ = ["Update", "UpdateWatch"]


@dataclass(frozen=True, slots=True)
class Update:
    """How what two branches add to the stream compares.

    Attributes:
        ratio: ‖s_m B_m‖_F / ‖s_a B_a‖_F; ``None`` where one of them is zero or not finite.
        cosine: ⟨s_m B_m, s_a B_a⟩ / (‖s_m B_m‖_F ‖s_a B_a‖_F); ``None`` there too, and where the shapes differ.
    """

    ratio: float | None = None
    cosine: float | None = None

    @classmethod
    def of(cls, mlp: Tensor, attention: Tensor) -> Update:
        """Compare two updates."""
        return cls.from_norms(*_norms(mlp, attention).tolist())

    @classmethod
    def from_norms(cls, m: float, a: float, cosine: float) -> Update:
        """Compare two updates by their norms and the cosine between them, NaN where there is none."""
        if not (0 < m < math.inf and 0 < a < math.inf):
            return cls()
        return cls(m / a, None if math.isnan(cosine) else max(-1.0, min(1.0, cosine)))


def _norms(mlp: Tensor, attention: Tensor) -> Tensor:
    """Return ‖m‖_F, ‖a‖_F and the cosine of the angle between them, in at least float32."""
    mlp, attention = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (mlp, attention))
    m, a = (torch.linalg.vector_norm(part) for part in (mlp, attention))
    inner = torch.vdot(mlp.flatten(), attention.flatten()) if mlp.shape == attention.shape else m * math.nan
    return torch.stack([m, a, inner / m / a])


@dataclass(eq=False)
class UpdateWatch:
    """Compares what the branches of each block add, in whatever forward passes run while it listens.

    It costs no pass of its own: hooks see the outputs of the sites, residual scales included, and keep one copy of one
    branch per block until the other one comes. Use it as a context around a training step; the last pass counts.

    Attributes:
        model: The model that the blocks were found in.
        blocks: The blocks.
        behind: For each branch the constant that follows its site (see :attr:`BranchFunction.behind`); a block with
            a branch that is not here is left out, because the output of its site is not what is added.
        error: What went wrong in the last pass, ``None`` where nothing did.
    """

    model: nn.Module
    blocks: Sequence[ResidualBlock]
    behind: Mapping[Branch, float]
    error: Exception | None = field(default=None, init=False)
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False)

    def __enter__(self) -> UpdateWatch:
        """Begin to listen."""
        self._seen, self.error = {}, None
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            if attention in self.behind and mlp in self.behind:
                held: dict[Branch, Tensor] = {}
                for branch in (attention, mlp):
                    assert branch is not None
                    module = module_at(self.model, branch.site)
                    if module is not None:  # else the user has taken the block out of the model
                        self._handles.append(module.register_forward_hook(self._noting(block, branch, held)))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def updates(self) -> dict[int, Update]:
        """The comparisons of the last pass by the index of the block, read in one transfer from the device."""
        if not self._seen:
            return {}
        numbers = torch.stack([*self._seen.values()]).tolist()
        return {index: Update.from_norms(*norms) for index, norms in zip(self._seen, numbers, strict=True)}

    def _noting(self, block: ResidualBlock, branch: Branch, held: dict[Branch, Tensor]) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            try:
                part = output if branch.output_index is None else output[branch.output_index]
                # A copy: the model may add the stream to this very tensor before the other branch has run.
                held[branch] = part * self.behind[branch]
                if block.attention in held and block.mlp in held:
                    assert block.attention is not None
                    assert block.mlp is not None
                    self._seen[block.index] = _norms(held[block.mlp], held[block.attention])
                    held.clear()
            except Exception as error:  # what goes wrong here must not go wrong in the user's forward pass
                self.error = error

        return hook
