"""Comparison of the updates that the two branches of a block add to the stream, in passes that run anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.records import Branch, ResidualBlock
from lightning_spectral.weights.paths import module_at

__all__ = ["Update", "UpdateWatch"]


@dataclass(frozen=True, slots=True)
class Update:
    """Comparison of the update s_m B_m of the MLP with the update s_a B_a of the attention.

    Attributes:
        ratio: ‖s_m B_m‖_F / ‖s_a B_a‖_F; ``None`` if one of the norms is zero or not finite.
        cosine: ⟨s_m B_m, s_a B_a⟩ / (‖s_m B_m‖_F ‖s_a B_a‖_F); ``None`` if there is no ratio, or the shapes differ.
        mlp_norm: ‖s_m B_m‖_F; ``None`` where it is not finite.
        attention_norm: ‖s_a B_a‖_F; ``None`` where it is not finite.
    """

    ratio: float | None = None
    cosine: float | None = None
    mlp_norm: float | None = None
    attention_norm: float | None = None

    @classmethod
    def of(cls, mlp: Tensor, attention: Tensor) -> Update:
        """Compare two updates."""
        return cls.from_norms(*_norms(mlp, attention).tolist())

    @classmethod
    def from_norms(cls, m: float, a: float, cosine: float) -> Update:
        """Compare two updates by their norms and the cosine between them, which is NaN for different shapes."""
        norms = (m if math.isfinite(m) else None, a if math.isfinite(a) else None)
        if not (0 < m < math.inf and 0 < a < math.inf):
            return cls(None, None, *norms)
        return cls(m / a, None if math.isnan(cosine) else max(-1.0, min(1.0, cosine)), *norms)


def _norms(mlp: Tensor, attention: Tensor) -> Tensor:
    """Return ‖m‖_F, ‖a‖_F and the cosine of the angle between them, in at least float32."""
    mlp, attention = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (mlp, attention))
    m, a = (torch.linalg.vector_norm(part) for part in (mlp, attention))
    inner = torch.vdot(mlp.flatten(), attention.flatten()) if mlp.shape == attention.shape else m * math.nan
    return torch.stack([m, a, inner / m / a])


class UpdateWatch:
    """Compares the updates of each block in all forward passes that run while it listens.

    It costs no pass of its own. It sees the outputs of the sites, residual scales included, adds up the branches of a
    kind, and keeps a copy of each branch until all branches of the block have run. Use it as a context around a
    training step.

    Attributes:
        model: The model that the blocks were found in.
        blocks: The blocks.
        behind: For each branch, the constant behind its site (see :attr:`BranchFunction.behind`). A block is left out
            if one of its branches is missing here, or if two of its branches share a site.
        error: The exception that occurred while listening, ``None`` for none.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock], behind: Mapping[Branch, float]) -> None:
        self.model, self.blocks, self.behind = model, blocks, behind
        self.numbers: dict[int, Tensor] = {}
        self.error: Exception | None = None
        self._listeners: list[Listener] = []
        self._fused = True

    def __enter__(self) -> UpdateWatch:
        """Begin to listen; the last pass counts. Fused kernels are off meanwhile, so that sites run as modules."""
        self._fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the listeners from the model."""
        self.stop()
        torch.backends.mha.set_fastpath_enabled(self._fused)

    def start(self) -> None:
        """Begin to listen; nothing happens if it listens already. Of several passes, the last counts."""
        if self._listeners:
            return
        for block in self.blocks:
            branches = [*block.attention_branches, *block.mlp_branches]
            sites = [module_at(self.model, branch.site) for branch in branches if branch in self.behind]
            found = [site for site in sites if site is not None]
            # Otherwise a branch has no constant, shares its site with another, or was removed from the model.
            if block.attention and block.mlp and len(set(found)) == len(branches):
                held: dict[Branch, Tensor] = {}
                for branch, site in zip(branches, found, strict=True):
                    self._listeners += listen([site], _Site(self, block, branch, held))

    def stop(self) -> None:
        """Remove the listeners from the model."""
        stop_listening(self._listeners)

    @property
    def updates(self) -> dict[int, Update]:
        """The comparison of each block in the pass that counts, by its index. One transfer from the device."""
        if not self.numbers:
            return {}
        numbers = torch.stack([*self.numbers.values()]).tolist()
        return {index: Update.from_norms(*norms) for index, norms in zip(self.numbers, numbers, strict=True)}


class _Site:
    """Listener of one branch. Its exceptions are kept and never reach the user's forward pass."""

    def __init__(self, watch: UpdateWatch, block: ResidualBlock, branch: Branch, held: dict[Branch, Tensor]) -> None:
        self._watch, self._block, self._branch, self._held = watch, block, branch, held

    def __call__(
        self, module: nn.Module, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = call()
        try:
            self._note(output if self._branch.output_index is None else output[self._branch.output_index])
        except Exception as error:
            self._watch.error = error
        return output

    def _note(self, part: Tensor) -> None:
        kinds = self._block.mlp_branches, self._block.attention_branches
        with torch.no_grad(), _disable_current_modes():
            # A copy: the model may add the stream to this very tensor before the other branches have run.
            self._held[self._branch] = part * self._watch.behind[self._branch]
            if len(self._held) == sum(map(len, kinds)):
                parts = [[self._held[branch] for branch in kind] for kind in kinds]
                self._held.clear()
                if all(item.shape == kind[0].shape for kind in parts for item in kind):
                    mlp, attention = (sum(others, first) for first, *others in parts)
                    self._watch.numbers[self._block.index] = _norms(mlp, attention)
