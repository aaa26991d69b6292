"""Weights that are tensors by name: those of a state dict, or of a block of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, Path, ResidualBlock
from lightning_spectral.weights.names import parameters_of, plain_name, scale_key, stored_names, unwrapped
from lightning_spectral.weights.placing import differences, place

__all__ = ["StoredWeights", "in_state_dict"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeights:
    """The weights of a model by name; see :class:`~lightning_spectral.weights.protocol.Weights`.

    Attributes:
        tensors: The tensors, by the names of a state dict. A residual scale is stored beside what it multiplies: as a
            child of its site, or as the parametrization of a weight.
    """

    tensors: Mapping[str, Tensor]

    def gathered(self, paths: Iterable[Path]) -> tuple[StoredWeights, None]:
        """Return the weights, of which none is cut."""
        return self, None

    @contextmanager
    def read(self, path: str) -> Iterator[Tensor]:
        """Return a weight, with the residual scale on it, if it has one.

        Raises:
            ConfigurationError: It is not stored.
        """
        found = stored_names(path, self.tensors)
        if found is None:
            raise ConfigurationError(f"{path} is not there")
        tensor = self.tensors[found[0]].detach()
        if found[1] is not None:  # rounded as the model rounds it
            tensor = tensor * torch.exp(self.tensors[found[1]].detach()).to(tensor.dtype)
        yield tensor

    def log_scale(self, branch: Branch) -> str | None:
        """Return the name of the logarithm of a branch's residual scale, ``None`` where it has none."""
        if branch.site.startswith("param:"):
            found = stored_names(branch.site.removeprefix("param:"), self.tensors)
            return None if found is None else found[1]
        key = scale_key(branch.site)
        return key if key in self.tensors else None


def in_state_dict(
    state_dict: Mapping[str, Tensor], blocks: Sequence[ResidualBlock]
) -> tuple[StoredWeights, Sequence[ResidualBlock]]:
    """Return what blocks read in a state dict, and the blocks under the names that it has there.

    Args:
        state_dict: The state dict. Its names may have a prefix, and what wrappers add to names.
        blocks: The blocks of the model, or of one of the same architecture and size.

    Raises:
        ConfigurationError: A weight is missing, has another shape or holds no numbers, or the model is there twice.
    """
    blocks = unwrapped(blocks)
    held: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor) and held.setdefault(plain_name(key), value) is not value:
            raise ConfigurationError(f"the state dict has {plain_name(key)!r} twice, once inside of a wrapper")
    expected = parameters_of(blocks)
    found, twice = place(held, expected)
    if twice is not None:
        raise ConfigurationError(
            f"the state dict has the weights of the model twice, as {twice[0]!r} and as {twice[1]!r}, expected one "
            f"copy: {{name: tensor for name, tensor in state_dict.items() if not name.startswith({twice[1]!r})}}"
        )
    tensors = {name: held[pieces[0][1]] for name, pieces in found.items()}
    problem, _ = differences(expected, tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if problem:
        raise ConfigurationError(
            f"the state dict: {problem}. Expected that of the model that the blocks were found in, or of one of its "
            "architecture and size; of a checkpoint, checkpoint['state_dict']"
        )
    hollow = [name for name, item in tensors.items() if item.is_meta or type(item) not in (Tensor, nn.Parameter)]
    if hollow:
        kind = "on the meta device" if tensors[hollow[0]].is_meta else f"a {type(tensors[hollow[0]]).__name__}"
        raise ConfigurationError(
            f"{len(hollow)} weights hold no numbers, or not all: {hollow[0]} is {kind}. Expected plain tensors: "
            "load the weights, gather sharded ones (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "full_state_dict=True), or measure the model, measure(model, blocks)"
        )
    return StoredWeights(tensors), blocks
