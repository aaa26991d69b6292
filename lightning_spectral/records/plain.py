"""Blocks as plain values, which fit into any file, and back, from files that nobody trusts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from lightning_spectral.records import Branch, BranchKind, End, Factor, FactorRole, Path, ResidualBlock
from lightning_spectral.records.layout import ARITHMETIC, REDUCTIONS, VIEWS

__all__ = ["FORMAT", "from_plain", "to_plain"]

FORMAT = "lightning_spectral"
"""Key of the version of the format."""

_VERSION = 1
# No real model comes near these.
_MAX_NAME, _MAX_REMARK, _MAX_ITEMS, _MAX_NUMBER = 512, 4096, 2**20, 2**24


def to_plain(blocks: Iterable[ResidualBlock]) -> dict[str, Any]:
    """Return blocks as dicts, lists, text and numbers; factors that occur several times stand there once.

    Args:
        blocks: The blocks.
    """
    factors: dict[Factor, int] = {}

    def chain(path: Path) -> dict[str, Any]:
        numbers = [factors.setdefault(factor, len(factors)) for factor in path.factors]
        return {"factors": numbers, "expert": path.expert}

    def branch(item: Branch) -> dict[str, Any]:
        return {
            "kind": item.kind,
            "site": item.site,
            "output_index": item.output_index,
            "paths": [chain(path) for path in item.paths],
            "reason": item.reason,
            "ends": [[end.parameter, end.offset] for end in item.ends],
            "ends_reason": item.ends_reason,
            "aliases": list(item.aliases),
        }

    listed = [
        {
            "index": block.index,
            "name": block.name,
            "branches": [branch(item) for item in block.branches],
            "verified": block.verified,
            "evidence": block.evidence,
            "token_dims": list(block.token_dims),
        }
        for block in blocks
    ]
    return {FORMAT: _VERSION, "blocks": listed, "factors": [_plain_factor(factor) for factor in factors]}


def _plain_factor(factor: Factor) -> dict[str, Any]:
    return {
        "role": factor.role,
        "parameter": factor.parameter,
        "layout": [[list(item) if isinstance(item, tuple) else item for item in step] for step in factor.layout],
        "rows": None if factor.rows is None else [[run.start, run.stop, run.step] for run in factor.rows],
        "constant": factor.constant,
        "size": factor.size,
        "adapters": [[_plain_factor(item) for item in chain] for chain in factor.adapters],
        "shape": None if factor.shape is None else list(factor.shape),
    }


def from_plain(plain: Any) -> tuple[ResidualBlock, ...]:
    """Return the blocks that :func:`to_plain` has written. Nothing in the values is trusted.

    Args:
        plain: The values. Lists may have become tuples.

    Raises:
        ValueError: They are of another version, or not what this module writes.
    """
    version = _of(plain, dict).get(FORMAT)
    if version != _VERSION:
        raise ValueError(f"its version is {version!r}, expected {_VERSION}")
    factors = [_factor(_of(item, dict)) for item in _list(plain.get("factors"))]
    return tuple(_block(_of(item, dict), factors) for item in _list(plain.get("blocks")))


def _block(plain: dict[Any, Any], factors: list[Factor]) -> ResidualBlock:
    return ResidualBlock(
        _number(plain.get("index")),
        _text(plain.get("name")),
        tuple(_branch(_of(item, dict), factors) for item in _list(plain.get("branches"))),
        verified=_of(plain.get("verified"), bool),
        evidence=_remark(plain.get("evidence")),
        token_dims=tuple(_number(item) for item in _list(plain.get("token_dims"))),
    )


def _branch(plain: dict[Any, Any], factors: list[Factor]) -> Branch:
    reasons = (plain.get("reason"), plain.get("ends_reason"))
    reason, ends_reason = (None if item is None else _remark(item) for item in reasons)
    return Branch(
        _one_of(plain.get("kind"), get_args(BranchKind)),
        _text(plain.get("site")),
        _key(plain.get("output_index")),
        tuple(_path(_of(item, dict), factors) for item in _list(plain.get("paths"))),
        reason,
        tuple(End(_text(path), _real(offset)) for path, offset in map(_list, _list(plain.get("ends")))),
        ends_reason,
        tuple(_text(path) for path in _list(plain.get("aliases", ()))),
    )


def _path(plain: dict[Any, Any], factors: list[Factor]) -> Path:
    numbers = [_number(item) for item in _list(plain.get("factors"))]
    if not all(0 <= number < len(factors) for number in numbers):
        raise ValueError("a path has a factor that is not there")
    return Path(tuple(factors[number] for number in numbers), _key(plain.get("expert")))


def _factor(plain: dict[Any, Any]) -> Factor:
    parameter, rows, size, shape = (plain.get(key) for key in ("parameter", "rows", "size", "shape"))
    return Factor(
        _one_of(plain.get("role"), get_args(FactorRole)),
        None if parameter is None else _text(parameter),
        tuple(_step(_list(item)) for item in _list(plain.get("layout"))),
        None if rows is None else _rows(_list(rows)),
        _real(plain.get("constant")),
        None if size is None else _number(size),
        tuple(_adapter(_list(chain)) for chain in _list(plain.get("adapters", ()))),
        None if shape is None else tuple(map(_number, _list(shape))),
    )


def _adapter(chain: list[Any]) -> tuple[Factor, ...]:
    factors = [_of(item, dict) for item in chain]
    if not factors or any(factor.get("adapters") for factor in factors):
        raise ValueError("an adapter has no factors, or has adapters itself")
    return tuple(map(_factor, factors))


def _step(step: list[Any]) -> tuple[Any, ...]:
    name, *arguments = step
    _one_of(name, {*VIEWS, *ARITHMETIC, *REDUCTIONS})  # tensors have methods that write files, too
    return (name, *(_argument(item) for item in arguments))


def _argument(item: Any) -> Any:
    if isinstance(item, list | tuple):
        return tuple(_number(number) for number in item)
    return _real(item) if isinstance(item, float) else _number(item)


def _rows(rows: list[Any]) -> tuple[range, ...]:
    runs = tuple(range(*(_number(number) for number in _list(item))) for item in rows)
    if not all(run.start >= 0 and run.step > 0 for run in runs) or sum(map(len, runs)) > _MAX_ITEMS:
        raise ValueError("rows are not counted upwards from 0")
    return runs


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"found a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) > _MAX_ITEMS:
        raise ValueError(f"found a {type(value).__name__}, expected a list")
    return list(value)


def _one_of(value: Any, known: Iterable[str]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"found {str(value)[:_MAX_NAME]!r}, expected one of {', '.join(sorted(known))}")
    return value


def _text(value: Any) -> str:
    """Return a name. One with double underscores would lead into Python instead of the model."""
    if not isinstance(value, str) or len(value) > _MAX_NAME or not value.isprintable():
        raise ValueError(f"found a {type(value).__name__}, expected {_MAX_NAME} printable characters at most")
    if any(part.startswith("__") for part in value.split(".")):
        raise ValueError(f"found {value!r}, which is no path in a model")
    return value


def _remark(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_REMARK:
        raise ValueError(f"found a {type(value).__name__}, expected {_MAX_REMARK} characters at most")
    return "".join(item if item.isprintable() else " " for item in value)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MAX_NUMBER:
        raise ValueError(f"found {str(value)[:50]!r}, expected a whole number up to {_MAX_NUMBER}")
    return value


def _real(value: Any) -> float:
    if not isinstance(value, float):
        return _number(value)
    return value


def _key(value: Any) -> int | str | None:
    if value is None or isinstance(value, str):
        return None if value is None else _text(value)
    return _number(value)
