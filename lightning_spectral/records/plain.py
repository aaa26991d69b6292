"""Blocks as plain values, which fit into any file, and back from values that nobody trusts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from lightning_spectral.records import Branch, BranchKind, End, Factor, FactorRole, Path, ResidualBlock, StreamAt
from lightning_spectral.records.layout import ARITHMETIC, REDUCTIONS, VIEWS
from lightning_spectral.records.values import MAX_ITEMS, listed, module_path, of_type, one_of, real, remark, whole

__all__ = ["FORMAT", "from_plain", "to_plain"]

FORMAT = "lightning_spectral"
"""Key of the version of the format."""

_VERSION = 1


def to_plain(blocks: Iterable[ResidualBlock]) -> dict[str, Any]:
    """Return blocks as dicts, lists, text and numbers. A factor that several paths share is written once.

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
            "stream": None if block.stream is None else [block.stream.module, block.stream.taken],
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
    """Return the blocks from the values of :func:`to_plain`. Every value is checked.

    Args:
        plain: The values. Lists may have become tuples.

    Raises:
        ValueError: The values are of another version, or not what :func:`to_plain` writes.
    """
    version = of_type(plain, dict).get(FORMAT)
    if version != _VERSION:
        raise ValueError(f"its version is {version!r}, expected {_VERSION}")
    factors = [_factor(of_type(item, dict)) for item in listed(plain.get("factors"))]
    return tuple(_block(of_type(item, dict), factors) for item in listed(plain.get("blocks")))


def _block(plain: dict[Any, Any], factors: list[Factor]) -> ResidualBlock:
    stream = plain.get("stream")
    return ResidualBlock(
        whole(plain.get("index")),
        module_path(plain.get("name")),
        tuple(_branch(of_type(item, dict), factors) for item in listed(plain.get("branches"))),
        verified=of_type(plain.get("verified"), bool),
        evidence=remark(plain.get("evidence")),
        token_dims=tuple(whole(item) for item in listed(plain.get("token_dims"))),
        stream=None if stream is None else _stream_at(stream),
    )


def _stream_at(plain: Any) -> StreamAt:
    if len(listed(plain)) != 2:
        raise ValueError(f"a stream is heard at {plain!r}: expected a module and whether it takes the stream")
    module, taken = plain
    return StreamAt(None if module is None else module_path(module), of_type(taken, bool))


def _branch(plain: dict[Any, Any], factors: list[Factor]) -> Branch:
    reasons = (plain.get("reason"), plain.get("ends_reason"))
    reason, ends_reason = (None if item is None else remark(item) for item in reasons)
    return Branch(
        one_of(plain.get("kind"), get_args(BranchKind)),
        module_path(plain.get("site")),
        _key(plain.get("output_index")),
        tuple(_path(of_type(item, dict), factors) for item in listed(plain.get("paths"))),
        reason,
        tuple(End(module_path(path), real(offset)) for path, offset in map(listed, listed(plain.get("ends")))),
        ends_reason,
        tuple(module_path(path) for path in listed(plain.get("aliases", ()))),
    )


def _path(plain: dict[Any, Any], factors: list[Factor]) -> Path:
    numbers = [whole(item) for item in listed(plain.get("factors"))]
    if not all(0 <= number < len(factors) for number in numbers):
        raise ValueError("a path has a factor that is not there")
    return Path(tuple(factors[number] for number in numbers), _key(plain.get("expert")))


def _factor(plain: dict[Any, Any]) -> Factor:
    parameter, rows, size, shape = (plain.get(key) for key in ("parameter", "rows", "size", "shape"))
    return Factor(
        one_of(plain.get("role"), get_args(FactorRole)),
        None if parameter is None else module_path(parameter),
        tuple(_step(listed(item)) for item in listed(plain.get("layout"))),
        None if rows is None else _rows(listed(rows)),
        real(plain.get("constant")),
        None if size is None else whole(size),
        tuple(_adapter(listed(chain)) for chain in listed(plain.get("adapters", ()))),
        None if shape is None else tuple(map(whole, listed(shape))),
    )


def _adapter(chain: list[Any]) -> tuple[Factor, ...]:
    factors = [of_type(item, dict) for item in chain]
    if not factors or any(factor.get("adapters") for factor in factors):
        raise ValueError("an adapter has no factors, or has adapters itself")
    return tuple(map(_factor, factors))


def _step(step: list[Any]) -> tuple[Any, ...]:
    name, *arguments = step
    # Only known names: a step is the name of a method, and tensors have methods that write files.
    one_of(name, {*VIEWS, *ARITHMETIC, *REDUCTIONS})
    return (name, *(_argument(item) for item in arguments))


def _argument(item: Any) -> Any:
    if isinstance(item, list | tuple):
        return tuple(whole(number) for number in item)
    return real(item) if isinstance(item, float) else whole(item)


def _rows(rows: list[Any]) -> tuple[range, ...]:
    runs = tuple(range(*(whole(number) for number in listed(item))) for item in rows)
    if not all(run.start >= 0 and run.step > 0 for run in runs) or sum(map(len, runs)) > MAX_ITEMS:
        raise ValueError("rows are not counted upwards from 0")
    return runs


def _key(value: Any) -> int | str | None:
    if value is None or isinstance(value, str):
        return None if value is None else module_path(value)
    return whole(value)
