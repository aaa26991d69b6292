"""Blocks that a monitor has left in a checkpoint: what is in them is as untrusted as the rest of the file."""

from __future__ import annotations

import copy
import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import example

from lightning_spectral import audit, find_blocks
from lightning_spectral.errors import CheckpointError
from lightning_spectral.records.plain import from_plain, to_plain


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return to_plain(find_blocks(example("llama").build()))


def test_blocks_of_a_deep_model_are_small(plain: dict[str, Any]):
    """Less than a kilobyte and a half a block, of which 96 are 140 kB."""
    file = io.BytesIO()
    torch.save(plain, file)
    assert len(file.getvalue()) < 1500 * len(plain["blocks"]) + 1000
    assert from_plain(torch.load(io.BytesIO(file.getvalue()), weights_only=True)) == from_plain(plain)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return value


BRANCH = ("blocks", 0, "branches", 0)


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (("lightning_spectral",), 2, "its version is 2, expected 1"),
        (("factors",), 3, "found [31], expected a list"),
        (("factors", 0), 3, "found [31], expected a dict"),
        (("factors", 0, "role"), "gate", "found 'gate', expected one of down, inner_norm"),
        (("factors", 0, "parameter"), "a.__class__.b", "found 'a.__class__.b', expected a path in a model"),
        (("factors", 0, "parameter"), "a\nb", "expected 512 printable characters at most"),
        (("factors", 0, "parameter"), "a" * 600, "expected 512 printable characters at most"),
        (("factors", 0, "layout"), [["tofile", "/tmp/x"]], "found 'tofile', expected one of abs, add"),
        (("factors", 0, "layout"), [["expand", [10**6, 10**6]]], "found 'expand', expected one of"),
        (("factors", 0, "layout"), [["add", "x"]], "found 'x', expected a whole number"),
        (("factors", 0, "layout"), [["reshape", [2**30, 1]]], "found 1073741824, expected a whole number from"),
        (("factors", 0, "rows"), [[0, 10, -1]], "rows are not counted upwards from 0"),
        (("factors", 0, "rows"), [[-5, 10, 1]], "rows are not counted upwards from 0"),
        (("factors", 0, "rows"), [[0, 2**24, 1]], "rows are not counted upwards from 0"),
        (("factors", 0, "constant"), None, "found None, expected a whole number"),
        (("factors", 0, "size"), True, "found True, expected a whole number"),
        (("factors", 0, "shape"), 3, "found [31], expected a list"),
        (("factors", 0, "shape"), [8, "x"], "found 'x', expected a whole number"),
        (("blocks", 0), [], "found a list, expected a dict"),
        (("blocks", 0, "verified"), 1, "found [31], expected a bool"),
        (("blocks", 0, "evidence"), "x" * 5000, "expected 4096 characters at most"),
        ((*BRANCH, "kind"), ["mlp"], "found a list, expected one of"),
        ((*BRANCH, "paths", 0, "factors"), [99], "a path has a factor that is not there"),
        ((*BRANCH, "paths", 0, "factors"), [-1], "a path has a factor that is not there"),
        ((*BRANCH, "ends"), [["a"]], "not enough values to unpack"),
    ],
)
def test_what_is_no_block_is_refused(path: Any, new: Any, message: str, plain: Any, tmp_path: Path):
    state = example("llama").build().state_dict()
    changed = replaced(plain, path, new)
    torch.save({"state_dict": state, "callbacks": {"monitor": {"blocks": changed}}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        from_plain(changed)
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt: not readable as the blocks that a monitor has left in a check"
    ):
        audit(tmp_path / "a.ckpt")


def test_blocks_from_before_shapes_were_kept_are_read(plain: dict[str, Any], tmp_path: Path):
    """Sizes are compared where they are known."""
    model = example("llama").build()
    older = plain | {"factors": [{key: item[key] for key in item if key != "shape"} for item in plain["factors"]]}
    assert {factor.shape for block in from_plain(older) for branch in block.branches for factor in branch.factors} == {
        None
    }
    for name, blocks in (("older.ckpt", older), ("newer.ckpt", plain)):
        torch.save({"state_dict": model.state_dict(), "callbacks": {"m": {"blocks": blocks}}}, tmp_path / name)
    assert audit(tmp_path / "older.ckpt") == audit(tmp_path / "newer.ckpt")


def test_a_failed_self_check_is_told(tmp_path: Path):
    """But not of blocks that the user has described: those are not checked."""
    model = example("llama").build()
    found = find_blocks(model)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for evidence, notes in (("trace; not verified: why", 1), ("hints", 0)):
        audited = audit(tmp_path / "a.pt", (replace(found[0], verified=False, evidence=evidence), *found[1:]))
        assert len(audited.notes) == notes
        assert all(
            "failed on 1 of 3 blocks" in note and f"{found[0].name} ({evidence})" in note for note in audited.notes
        )


def test_damaged_blocks_are_measured_or_refused(plain: Any, tmp_path: Path):
    """Three hundred times another value at some place, of another type or out of all bounds."""
    state = {name: value.clone() for name, value in example("llama").build().state_dict().items()}
    values: list[Any] = [0, 1, -1, 7, 10**6, 2**24, 0.0, float("nan"), None, True, "", "x", "weight", [], {}, [[]]]
    values += [[0, 1], [["t"]], [["select", 0, 0]], [["reshape", [-1]]], [["narrow", 0, 1, 3]], [["flatten", 0]]]
    values += [[["div", 0]], [[0, 5, 1]], [[3, 9, 2], [1, 3, 1]], "model.layers.0", "model.norm.weight"]
    source, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(300):
        path, place = [], plain
        while isinstance(place, dict | list) and place and (len(path) < 2 or source.random() < 0.9):
            path.append(source.choice(list(place) if isinstance(place, dict) else range(len(place))))
            place = place[path[-1]]
        changed = replaced(plain, tuple(path), source.choice(values))
        torch.save({"state_dict": state, "callbacks": {"monitor": {"blocks": changed}}}, tmp_path / "a.ckpt")
        try:
            audit(tmp_path / "a.ckpt")
        except CheckpointError as error:
            message = str(error)
        else:
            outcomes[True] += 1
            continue
        outcomes[False] += 1
        assert message.isprintable()
        assert len(message) < 1200
    assert min(outcomes.values()) > 20  # both happen
