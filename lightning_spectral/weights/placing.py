"""Where a state dict keeps the weights of a model: behind which prefix, and whether it has them twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

from lightning_spectral.weights.names import scale_keys, stored_names, weight_of

__all__ = ["differences", "place"]

_DEPTH = 4  # components of a prefix, as in "trainer.module.net.encoder."
_MOST_DICTS = 16

Pieces = Mapping[str, Sequence[tuple[str | None, str]]]


def place(
    names: Collection[str],
    wanted: Collection[str],
    dicts: Iterable[str] = (),
    rename: Callable[[str], tuple[str, str | None]] = lambda name: (name, None),
    order: Callable[[str], Any] = str,
) -> tuple[Pieces, tuple[str, str] | None]:
    """Find the weights of a model whose names are known.

    Args:
        names: The names of the state dict. They may have a prefix, as the names of a LightningModule have.
        wanted: The names of the model.
        dicts: What the names of each dict in a checkpoint begin with, the last dot included.
        rename: Returns the name in the model, and the pattern of a conversion if one takes part.
        order: Key to sort names by, so that pieces are put together in their order.

    Returns:
        For each weight of the model, and each residual scale, what it is made of: patterns of a conversion (``None``
        for a copy) and names. Then two prefixes that all of it stands behind, ``None`` where there is one copy.
    """
    found: dict[str, Pieces] = {}
    for prefix in _prefixes(names, dicts):
        inside = sorted((name.removeprefix(prefix) for name in names if name.startswith(prefix)), key=order)
        found[prefix] = _assigned(prefix, inside, wanted, rename)
    best = max(found, key=lambda prefix: len(found[prefix]))
    return found[best], _twice(found, best, wanted)


def _prefixes(names: Collection[str], dicts: Iterable[str]) -> list[str]:
    """Return what the names of a model may begin with: a dict in the file, and in it what a quarter of the names do."""
    found = {"": None}
    inside = {begin: [name for name in names if name.startswith(begin)] for begin in ("", *dicts)}
    for begin in sorted(inside, key=lambda begin: -len(inside[begin]))[:_MOST_DICTS]:
        behind = [name.removeprefix(begin) for name in inside[begin]]
        counts = Counter(
            prefix for name in behind for prefix in accumulate(part + "." for part in name.split(".")[:-1][:_DEPTH])
        )
        common = sorted((prefix for prefix, count in counts.items() if 4 * count >= len(behind)), key=len)
        found |= dict.fromkeys(begin + prefix for prefix in ("", *common))
    return list(found)


def _assigned(
    prefix: str, names: Sequence[str], wanted: Collection[str], rename: Callable[[str], tuple[str, str | None]]
) -> Pieces:
    scales = set(scale_keys(names))
    result: defaultdict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for name in names:
        if name in scales or weight_of(name) in wanted:
            result[name].append((None, prefix + name))
            continue
        target, pattern = rename(name)
        if target in wanted:
            result[target].append((pattern, prefix + name))
    return result


def _twice(found: Mapping[str, Pieces], best: str, wanted: Collection[str]) -> tuple[str, str] | None:
    """Return the prefixes of two copies: of a model and its moving average, or of a student and its teacher."""

    def whole(prefix: str) -> dict[str, list[str]]:
        """What stands for every weight of the model; residual scales, of which a copy may have none, do not count."""
        names = {item: stored_names(item, found[prefix]) for item in wanted}
        return {item: [name for _, name in found[prefix][stored[0]]] for item, stored in names.items() if stored}

    mine = whole(best)
    taken = set(chain.from_iterable(mine.values()))
    models = {prefix: whole(prefix) for prefix in found if mine and len(found[prefix]) >= len(mine)}
    others = [prefix for prefix, names in models.items() if names.keys() >= mine.keys()]
    copies = [prefix for prefix in others if taken.isdisjoint(chain.from_iterable(models[prefix].values()))]
    if not copies:
        return None
    # A library may look behind a prefix by itself: the longer way to the same weights is the one to name.
    same = [prefix for prefix in others if models[prefix] == mine and not copies[0].startswith(prefix)]
    return (same or [best])[0], copies[0]


def differences(
    expected: Mapping[str, tuple[int, ...] | None], names: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Say in what a state dict differs from what is expected; nothing where all is as expected.

    Args:
        expected: Shapes of the weights that will be read, ``None`` where they are not known.
        names: The names of the state dict.
        shapes: Shapes by these names, as far as they are known.

    Returns:
        A sentence without full stop, and the weights of another shape: the name, that shape and the expected one.
    """
    stored = {name: stored_names(name, names) for name in expected}
    absent = [name for name, found in stored.items() if found is None]
    wrong = [
        (name, shapes[found[0]], wide)
        for name, found in stored.items()
        if found is not None and (wide := expected[name]) is not None and shapes.get(found[0], wide) != wide
    ]
    if not absent and not wrong:
        return "", []
    first = f"{wrong[0][0]} is {wrong[0][1]}, expected {wrong[0][2]}" if wrong else f"{absent[0]} is not there"
    return (
        f"{len(absent)} of {len(expected)} weights are missing (parametrized ones are stored in pieces) and "
        f"{len(wrong)} have another shape (packed ones do): {first}"
    ), wrong
