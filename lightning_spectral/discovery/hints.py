"""The escape hatch: a short declarative mapping for a model that discovery does not understand.

.. code-block:: python

    hints = {
        "layers.*": {                                    # block path; * stands for one component
            "attention": {"site": "att.out",             # paths below are relative to the block
                          "output": "att.out.weight",
                          "value": {"parameter": "att.qkv.weight", "rows": [[128, 192]]},
                          "pre_norm": "norm1.weight"},
            "mlp": "ffn",                                # site only: the factors come from the trace
        },
    }

The ends of a branch (see :class:`~lightning_spectral.records.Branch`) come from the trace where the hint names the
site of a traced branch of its kind. Elsewhere the hint decides: the end is the norm behind the branch, or else the
first matrix, each with the ``bias`` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

from torch import Tensor, nn

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, BranchKind, End, Factor, FactorRole, Path, ResidualBlock
from lightning_spectral.records.layout import ARITHMETIC, REDUCTIONS, VIEWS
from lightning_spectral.weights.paths import resolve

__all__ = ["with_hints"]

# The order of the matrix product, from the site back to the stream.
_FIRST: tuple[FactorRole, ...] = ("scale", "post_norm", "output", "down", "inner_norm")
_ORDER: tuple[FactorRole, ...] = (*_FIRST, "value", "latent", "up", "pre_norm")
_ENDS: tuple[FactorRole, ...] = ("post_norm", "output", "down", "value", "latent", "up")
_KINDS: tuple[BranchKind, ...] = get_args(BranchKind)
_STEPS = sorted({*VIEWS, *ARITHMETIC, *REDUCTIONS})


def with_hints(
    model: nn.Module, blocks: Sequence[ResidualBlock], hints: Mapping[str, Any]
) -> tuple[ResidualBlock, ...]:
    """Override the found blocks by the hints of the user, and add hinted blocks that were not found.

    Args:
        model: The model. Block paths and parameters must exist in it.
        blocks: The found blocks, possibly none.
        hints: Block pattern to branches, as the module's docstring shows.

    Returns:
        The blocks in the order of execution. If a hint adds a block, the order is that of the modules in the model.

    Raises:
        ConfigurationError: A pattern matches no module; a kind, a role, a layout or a parameter does not exist; what is
            named as a site is no module, or as a factor no parameter; or two neighbouring matrices do not fit.
    """
    paths = [path for path, _ in model.named_modules()]
    found = {block.name: block for block in blocks}
    for pattern, branches in hints.items():
        matches = [path for path in paths if _matches(pattern, path)]
        if not matches:
            raise ConfigurationError(
                f"hints: {pattern!r} matches no module; expected the path of a block such as {paths[-1]!r}, with * for "
                "one component"
            )
        for path in matches:
            name = next((name for name, block in found.items() if path in block.modules), path)
            found[name] = _hinted(model, path, found.get(name, ResidualBlock(0, path, ())), branches)
    ordered = list(found.values())  # in the order of execution; an added block has no place in it
    if len(found) > len(blocks):
        ordered.sort(key=lambda block: paths.index(block.name) if block.name in paths else -1)
    return tuple(replace(block, index=index) for index, block in enumerate(ordered))


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path) is not None


def _hinted(model: nn.Module, path: str, block: ResidualBlock, branches: Mapping[str, Any]) -> ResidualBlock:
    """Override branches of a block; paths in the hints are relative to ``path``."""
    result = list(block.branches)
    if not isinstance(branches, Mapping):
        raise ConfigurationError(
            f"hints: {path!r} came with {branches!r}; expected a dict from kinds of branches to their sites, such as "
            "{'attention': 'attn', 'mlp': 'mlp'}"
        )
    for kind, hint in branches.items():
        if kind not in _KINDS:
            raise ConfigurationError(f"hints: {kind!r} is not a kind of branch; expected one of {', '.join(_KINDS)}")
        known = next((branch for branch in result if branch.kind == kind), None)
        hinted = _branch(model, path, kind, hint, known)
        places = [place for place, branch in enumerate(result) if branch is known or branch.site == hinted.site]
        place = places[0] if places else len(result)
        result[place : place + 1] = [hinted]
    return replace(block, branches=tuple(result), verified=False, evidence="hints")


def _branch(model: nn.Module, block: str, kind: BranchKind, hint: Any, known: Branch | None) -> Branch:
    """Return a hinted branch. What the hint leaves out comes from the known branch."""
    if not isinstance(hint, str | Mapping):
        raise ConfigurationError(
            f"hints: {block}.{kind} came with {hint!r}; expected the path of its site, or a dict of 'site' and factors"
        )
    given = {"site": hint} if isinstance(hint, str) else dict(hint)
    site = given.pop("site", None)
    index = given.pop("output_index", None)
    if site is None and known is None:
        raise ConfigurationError(
            f"hints: {block}.{kind} needs a 'site', the module whose output is added to the stream"
        )
    path = known.site if site is None and known is not None else _module(model, block, str(site))
    factors = tuple(
        sorted((_factor(model, block, role, value) for role, value in given.items()), key=lambda item: _rank(item.role))
    )
    _check_neighbours(model, factors)
    paths = (Path(factors),) if factors else known.paths if known is not None else ()
    reason = None if paths else "the hint names a site but no factors, and the trace found none"
    element = known.output_index if index is None and known is not None else index
    branch = Branch(kind, path, element, paths, reason)
    if known is not None and (path, element) == (known.site, known.output_index):
        return replace(branch, ends=known.ends, ends_reason=known.ends_reason, aliases=known.aliases)
    return _with_ends(model, branch)


def _with_ends(model: nn.Module, branch: Branch) -> Branch:
    """Return a branch with its ends: in each path the first matrix, or the norm behind it, and the bias beside it."""
    leading = (next((item for item in path.factors if item.role in _ENDS), None) for path in branch.paths)
    ends: dict[End, None] = {}
    for factor in leading:
        offsets = [step[1] for step in factor.layout if step[0] == "add"] if factor is not None else []
        parts = {"narrow", "select"}.intersection(step[0] for step in factor.layout) if factor is not None else ()
        if factor is None or factor.parameter is None or factor.rows is not None or parts:
            return replace(branch, ends_reason="the hint names no whole parameter at its end")
        ends[End(factor.parameter, *offsets)] = None
        bias = f"{factor.parameter.rpartition('.')[0]}.bias"
        if factor.parameter != bias and _exists(model, bias):
            ends[End(bias)] = None
    return replace(branch, ends=tuple(ends), ends_reason=None if ends else branch.reason)


def _exists(model: nn.Module, path: str) -> bool:
    try:
        return resolve(model, path) is not None
    except AttributeError:
        return False


def _rank(role: FactorRole) -> int:
    """Return the place of a role in the matrix product."""
    return _ORDER.index(role)


def _factor(model: nn.Module, block: str, role: str, value: Any) -> Factor:
    """Return the factor of one entry of a hint: a number, a parameter path, or a mapping with a path."""
    if role not in _ORDER:
        raise ConfigurationError(f"hints: {role!r} is not a role of a factor; expected one of {', '.join(_ORDER)}")
    if isinstance(value, int | float):
        if role != "scale" and not role.endswith("_norm"):
            raise ConfigurationError(f"hints: {block}.{role} came with {value!r}; expected a parameter path")
        return Factor(role, None, constant=float(value))
    given = {"parameter": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    unknown = set(given) - {"parameter", "layout", "rows"}
    if unknown or "parameter" not in given:
        came = sorted(given) if given else repr(value)
        raise ConfigurationError(
            f"hints: {block}.{role} came with {came}; expected a parameter path, or a mapping with "
            "'parameter' and optionally 'layout' and 'rows'"
        )
    path = _absolute(model, block, given["parameter"])
    tensor = _tensor(model, path)
    size = tensor.shape[-1] if role.endswith("_norm") else None
    return Factor(role, path, _layout(path, given.get("layout", ())), _rows(path, given.get("rows")), size=size)


def _tensor(model: nn.Module, path: str) -> Tensor:
    found = resolve(model, path)
    if isinstance(found, Tensor):
        return found
    inner = [name for name, _ in found.named_parameters()] if isinstance(found, nn.Module) else []
    meant = f"did you mean '{path}.{inner[0]}'?" if inner else "expected a parameter"
    raise ConfigurationError(f"hints: {path!r} is a {type(found).__name__} and no parameter; {meant}")


def _layout(path: str, value: Any) -> tuple[tuple[Any, ...], ...]:
    steps = value if isinstance(value, list | tuple) else [value]
    layout = tuple(tuple(step) if isinstance(step, list | tuple) else (step,) for step in steps)
    if unknown := [step for step in layout if not step or step[0] not in _STEPS]:
        raise ConfigurationError(
            f"hints: {path} came with the layout {value!r}; {unknown[0]!r} begins with none of {', '.join(_STEPS)}"
        )
    return layout


def _rows(path: str, value: Any) -> tuple[range, ...] | None:
    if value is None:
        return None
    try:
        return tuple(range(*item) for item in value)
    except TypeError:
        raise ConfigurationError(
            f"hints: {path} came with rows={value!r}; expected pairs of the first row and the row behind the last, "
            "such as [[64, 96]]"
        ) from None


def _check_neighbours(model: nn.Module, factors: Sequence[Factor]) -> None:
    """Check that no whole matrix has more rows than the matrix in front of it takes columns.

    One that holds queries, keys and values has.
    """
    matrices = [
        (item, _tensor(model, item.parameter))
        for item in factors
        if item.parameter is not None and item.role in _ENDS and item.role != "post_norm"
    ]
    for (left, outer), (right, inner) in pairwise(matrices):
        whole = not (left.layout or left.rows or right.layout or right.rows)
        if whole and outer.ndim == inner.ndim == 2 and inner.shape[0] > outer.shape[1]:
            rows, takes = inner.shape[0], outer.shape[1]
            raise ConfigurationError(
                f"hints: {right.parameter} has {rows} rows, and {left.parameter} takes {takes}; name the rows of the "
                f"{right.role} matrix: {{'parameter': '…', 'rows': [[{rows - takes}, {rows}]]}}"
            )


def _module(model: nn.Module, block: str, relative: str) -> str:
    """Return the path in the model of a module in a block."""
    path = _absolute(model, block, relative)
    if not isinstance(found := resolve(model, path), nn.Module):
        raise ConfigurationError(
            f"hints: {path!r} is a {type(found).__name__}; expected a module, whose output is added to the stream"
        )
    return path


def _absolute(model: nn.Module, block: str, relative: str) -> str:
    """Return a path in the model from a path in a block. The path must exist."""
    path = f"{block}.{relative}" if block else relative
    try:
        resolve(model, path)
    except AttributeError:
        raise ConfigurationError(f"hints: the model has no {path!r} (paths are relative to the block)") from None
    return path
