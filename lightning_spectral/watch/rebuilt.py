"""Whether a model has other modules than when its blocks were found: a measurement reads what was there then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from lightning_spectral.records import ResidualBlock
from lightning_spectral.weights.names import CHILD, common_parts, plain_name

__all__ = ["told_of_rebuilt", "weighted_modules"]


def weighted_modules(model: nn.Module, blocks: Sequence[ResidualBlock]) -> dict[str, str]:
    """Return the classes of the modules with weights, by path, wherever blocks may come or go.

    Parametrized and pruned weights are of the same module as before, lazy modules of the class that they become.

    Args:
        model: The model.
        blocks: Its blocks.
    """
    stacks = {plain_name(path).rpartition(".")[0] for block in blocks for path in block.modules}
    inside = tuple(f"{stack}." for stack in stacks if stack)
    named = ((plain_name(path), module) for path, module in model.named_modules())
    return {
        path: parametrize.type_before_parametrizations(module).__name__.removeprefix("Lazy")
        for path, module in named
        if ("" in stacks or path.startswith(inside))
        and ".parametrizations." not in f".{path}."
        and (module._parameters or parametrize.is_parametrized(module))
    }


def told_of_rebuilt(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Say which modules have come, gone or become others; ``None`` where there are none."""
    gone = [path for path in before if path not in now]
    changes = {
        "new": [path for path in now if path not in before],
        "gone": [path for path in gone if not path.endswith(f".{CHILD}")],
        "residual scales gone": [path for path in gone if path.endswith(f".{CHILD}")],
        "of another class": [path for path in now if before.get(path, now[path]) != now[path]],
    }
    told = "; ".join(f"{what}: {_together(paths)}" for what, paths in changes.items() if paths)
    if not told:
        return None
    return (
        f"the model has other modules than when its blocks were found ({told}). What is measured are the blocks of "
        "then, as far as they are still there; another run finds those of now"
    )


def _together(paths: Sequence[str]) -> str:
    stem = ".".join(common_parts(paths)) if len(paths) > 1 else paths[0]
    return f"{len(paths)} in {stem}" if stem and len(paths) > 1 else ", ".join(paths[:3])
