"""Find the ends of each branch: the last parameters, which together scale it (see :mod:`..chains.scaling`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from lightning_spectral.discovery.chains.scaling import PARAMETRIZED, Scaling, ScalingWalk, UnscalableError
from lightning_spectral.discovery.structure.branches import FoundBranch
from lightning_spectral.discovery.trace.hankel import entrywise, is_hankel
from lightning_spectral.discovery.trace.operations import moved_input
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.surprises import SURPRISES, surprise
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import Branch, End
from lightning_spectral.weights.paths import resolve

__all__ = ["EndFinder"]

_FACTOR = 1.7  # by which the numerical test scales the ends
_TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-4}


class EndFinder:
    """Finds the ends of the branches of one recorded forward pass."""

    def __init__(self, tape: Tape, model: nn.Module, found: Iterable[FoundBranch], prober: Prober) -> None:
        """Remember the stream and the site of every call of every branch.

        Args:
            tape: The recorded forward pass.
            model: The model that was recorded.
            found: All branches of the pass. A branch that runs several times is in it once per run.
            prober: Answers numerical questions.
        """
        self.tape, self.model, self.prober = tape, model, prober
        self._modules = dict(model.named_modules())
        self._places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for branch in found:
            self._places[branch.site.path].append((branch.add.stream, branch.site.value))

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _idle(self) -> set[str]:
        """The parameters that did not take part in the forward pass, each by its first name."""
        return {name for name, _ in self.model.named_parameters()} - set(self.tape.names.values())

    def with_ends(self, record: Branch, branch: FoundBranch, block: str) -> Branch:
        """Return the record of a branch with its ends, or with the reason why it has none.

        Args:
            record: The record to complete.
            branch: The branch on the tape.
            block: Module path of its block; containers above it hold blocks, not experts.
        """
        region = Region(self.tape, branch.add.stream, branch.site.value)
        try:
            leaves = self._leaves(region, self._places[branch.site.path])
        except UnscalableError as error:
            return replace(record, ends_reason=str(error))
        except SURPRISES as error:
            return replace(record, ends_reason=surprise("its ends could not be read", error))
        ends = [End(self.tape.names[leaf], offset) for leaf, offset in leaves.items()]
        return replace(record, ends=tuple(dict.fromkeys(item for end in ends for item in self._siblings(end, block))))

    def _leaves(self, region: Region, places: Sequence[tuple[int, int]]) -> dict[int, float]:
        """Return the ends as values of the tape, each with its offset.

        The walk proposes ends. If some cannot be ends, the walk is repeated without them: a multiplier behind a matrix,
        such as a LayerScale, can be the end instead.

        Raises:
            UnscalableError: There are no ends.
        """
        refused: dict[int, str] = {}
        while True:
            found = ScalingWalk(self.tape, region.stream, refused).ends(region.leaf)
            if not found.leaves:
                raise UnscalableError("no weight stands at its end")
            wrong = {leaf: reason for leaf in found.leaves if (reason := self._refusal(leaf, places)) is not None}
            if not wrong and not self._is_scaled(region, found):
                names = ", ".join(self.tape.names[leaf] for leaf in found.leaves)
                wrong = dict.fromkeys(found.leaves, f"it is not proportional to {names}")
            if not wrong:
                return found.leaves
            refused |= wrong

    def _refusal(self, leaf: int, places: Sequence[tuple[int, int]]) -> str | None:
        """Return why a parameter cannot be an end, ``None`` where it can."""
        name = self.tape.names[leaf]
        if ".parametrizations." in name:
            return PARAMETRIZED.format(name)
        if not self.tape.tensors[leaf].is_floating_point():
            return f"its last weight {name} is stored as {self.tape.tensors[leaf].dtype}"
        if name not in self._parameters:
            return f"its last weight {name} is a buffer"
        if not self._serves_only(leaf, places):
            return f"its last weight {name} is also used elsewhere"
        return None

    def _serves_only(self, leaf: int, places: Sequence[tuple[int, int]]) -> bool:
        """Whether every use of a parameter ends in the site, in one of its calls. Unread views do not count."""
        tape, sites = self.tape, {site for _, site in places}
        seen, queue = {leaf}, [leaf]
        while queue:
            for reader in set(tape.readers[queue.pop()]):
                operation = tape.operations[reader]
                outputs = [output for output in operation.outputs if output not in seen]
                leads = any(
                    tape.depends(site, output) and (tape.depends(output, stream) or not tape.is_data(output))
                    for output in outputs
                    for stream, site in places
                )
                if outputs and not leads and moved_input(operation) is None:
                    return False
                seen.update(outputs)
                queue += [output for output in outputs if output not in sites]
        return True

    def _is_scaled(self, region: Region, found: Scaling) -> bool:
        """Whether scaling the parameters scales the branch, tested once per program."""
        shapes = tuple((self.tape.shape(leaf), offset) for leaf, offset in found.leaves.items())
        return self.prober.once(region, ("ends", shapes), partial(self._scales_exactly, region, found))

    def _scales_exactly(self, region: Region, found: Scaling) -> bool:
        """Whether f(c · ends) = c · f(ends) for c = 1.7, in a replay."""
        # Zeros and numbers that are not finite would pass any test, so noise replaces them.
        held = self.prober.made_up_weights(region) | {value: _alive(self.tape.wide(value)) for value in found.read}
        held = {value: content for value, content in held.items() if not self._made_of(value, found.leaves)}
        content = {leaf: self.tape.wide(leaf) for leaf in found.leaves}
        content = {leaf: content[leaf] if offset else _alive(content[leaf]) for leaf, offset in found.leaves.items()}
        larger = {leaf: _grown(content[leaf], offset) for leaf, offset in found.leaves.items()}
        try:
            before, after = (replay(self.tape, part, region.leaf, held=held) for part in (content, larger))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        error, size = (float(part.nan_to_num(0.0).abs().max()) for part in (after - _FACTOR * before, after))
        return error <= _TOLERANCE[before.dtype] * size

    def _made_of(self, value: int, leaves: Iterable[int]) -> bool:
        return any(self.tape.depends(value, leaf) for leaf in leaves)

    def _siblings(self, end: End, block: str) -> list[End]:
        """Return an end and the same parameter in every sibling expert that did not run.

        Experts are the entries of a container inside the block.
        """
        parts = end.parameter.split(".")
        found = [end]
        for depth in range(len(parts) - 1, len(block.split(".")) if block else 0, -1):
            container = self._modules.get(".".join(parts[:depth]))
            if not isinstance(container, nn.ModuleList | nn.ModuleDict):
                continue
            for key, _ in container.named_children():
                name = ".".join((*parts[:depth], key, *parts[depth + 1 :]))
                if name in self._idle and _shape(self.model, name) == _shape(self.model, end.parameter):
                    found.append(replace(end, parameter=name))
        return found


def _grown(content: Tensor, offset: float) -> Tensor:
    return entrywise(lambda entries: _FACTOR * (entries + offset) - offset, content)


def _alive(content: Tensor) -> Tensor:
    """Return the content, or noise if it is zero everywhere or not finite."""
    if (
        is_hankel(content)
        or not content.is_floating_point()
        or (bool(content.any()) and bool(content.isfinite().all()))
    ):
        return content
    return torch.randn(content.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(content)


def _shape(model: nn.Module, path: str) -> torch.Size:
    return resolve(model, path).shape  # type: ignore[attr-defined, no-any-return]
