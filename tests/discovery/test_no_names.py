"""Discovery carries over: its rooms know no model family, no class and no parameter by name."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from zoo import survey, unseen

import lightning_spectral.discovery

ROOMS = sorted(Path(lightning_spectral.discovery.__file__).parent.rglob("*.py"))
# Words of these tests and of PyTorch, not of a family.
WORDS = {"plain", "torch", "mha", "seed", "recurrent"}


@functools.cache
def families() -> set[str]:
    """The first word of every model of the survey, of its class, and of every other Hugging Face model of the zoo."""
    entries = survey.entries().values()
    names = {re.split(r"[^a-z]", entry["name"].lower())[0] for entry in entries}
    classes = {entry["class"].lower() for entry in entries if entry["class"]}
    others = {re.split(r"[^a-z]", member.name)[0] for member in unseen.members()}
    return {name for name in names | classes | others if len(name) > 1} - WORDS


def parameters() -> set[str]:
    """The last components of the surveyed parameters: ``q_proj``, ``c_attn``, ``query_key_value`` and the like."""
    parts = {
        part
        for entry in survey.entries().values()
        for pattern in entry["blocks"]
        for parameter in pattern["params"]
        for part in parameter.split(".")
    }
    return {part for part in parts if "_" in part}


def code(room: Path) -> Iterator[str]:
    """Every identifier and every string of a module, docstrings aside."""
    tree = ast.parse(room.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        for field in ("id", "attr", "name", "arg"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_no_family_is_named(room: Path) -> None:
    """Not even in a comment."""
    text = room.read_text(encoding="utf-8").lower()
    words = {*re.findall(r"[a-z0-9]+", text), *re.findall(r"[a-z]+", text)}
    assert words.isdisjoint(families()), words & families()


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_no_parameter_is_named(room: Path) -> None:
    """No identifier and no string is the name of a surveyed parameter or of the module that holds it."""
    assert not {name for text in code(room) for name in re.findall(r"\w+", text)} & parameters()


def test_the_lists_of_names_are_not_empty() -> None:
    """What is looked for is there to be found."""
    assert {"llama", "falcon", "gemma", "bert", "rwkv", "llamaforcausallm", "swin", "bloom"} <= families()
    assert {"q_proj", "c_attn", "query_key_value", "down_proj", "in_proj_weight"} <= parameters()
    assert len(ROOMS) > 10
