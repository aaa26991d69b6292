"""The tests themselves: they stand where their room stands, and none can pass without having looked at something."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import lightning_spectral

TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"
PACKAGE = Path(lightning_spectral.__file__).parent

# Folders that are about something else than one room.
OTHER = {"data", "distributed", "docs", "examples", "lifecycle", "shells", "support", "zoo"}
LOOSE = {"conftest.py", "test_house.py", "test_tests.py"}

FILES = sorted(TESTS.rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Every file of the tests, parsed. They go with this module, as they are large."""
    return {path.relative_to(TESTS).as_posix(): parsed(path) for path in FILES}


def seen(look: Callable[[ast.Module], Iterable[str]], trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Return what is seen in each file, without the files in which nothing is."""
    return {name: found for name, tree in trees.items() if (found := sorted(look(tree)))}


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def collected(tree: ast.AST) -> list[Function]:
    return [function for function in functions(tree) if function.name.startswith("test")]


def own(function: Function) -> Iterator[ast.AST]:
    """Yield what stands in a function, but not what stands in functions and classes inside it."""
    todo: list[ast.AST] = [*function.body]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def called(node: ast.AST) -> set[str]:
    """Return the names that are called anywhere inside: ``f`` of ``f()``, ``a.b`` of ``a.b()``."""
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


def asserts(node: ast.AST, helpers: Iterable[str] = ()) -> bool:
    """Whether something is asserted inside, by a statement, by pytest, by torch or numpy, or by one of the helpers."""
    names = called(node)
    return (
        any(isinstance(part, ast.Assert) for part in ast.walk(node))
        or not names.isdisjoint({"pytest.raises", "pytest.warns", "pytest.fail", *helpers})
        or any(name.rpartition(".")[2].startswith("assert_") for name in names)
    )


@functools.cache
def helpers_in(path: Path) -> set[str]:
    return helpers(parsed(path))


def helpers(tree: ast.Module) -> set[str]:
    """Return the functions that a test can call to have something asserted: its own, and those of ``tests/support``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (path := SUPPORT / f"{node.module}.py").exists():
            there = helpers_in(path)
            found |= {alias.asname or alias.name for alias in node.names if alias.name in there}
    own_functions = [function for function in functions(tree) if not function.name.startswith("test")]
    before = None
    while before != found:  # a helper may call another
        before = set(found)
        found |= {function.name for function in own_functions if asserts(function, found)}
    return found


def without_match(tree: ast.AST) -> list[str]:
    """Return the calls of ``pytest.raises`` and ``pytest.warns`` that any message would satisfy."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func) in ("pytest.raises", "pytest.warns")
        and "match" not in {word.arg for word in call.keywords}
    ]


def left_early(tree: ast.AST) -> list[str]:
    return [test.name for test in collected(tree) if any(isinstance(node, ast.Return) for node in own(test))]


def without_assertion(tree: ast.Module) -> list[str]:
    known = helpers(tree)
    return [test.name for test in collected(tree) if not asserts(test, known)]


def imports_of_tests(tree: ast.Module) -> set[str]:
    modules = {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in modules if name.startswith(("test_", "tests", "conftest"))}


def test_every_expected_error_has_a_message(trees: dict[str, ast.Module]):
    assert not seen(without_match, trees)


def test_no_test_is_left_early(trees: dict[str, ast.Module]):
    """What a test does not hold for is filtered where it is parametrized, or skipped; it is never green."""
    assert not seen(left_early, trees)


def test_every_test_asserts(trees: dict[str, ast.Module]):
    assert not seen(without_assertion, trees)


def test_no_test_imports_a_test(trees: dict[str, ast.Module]):
    """What two of them need stands in ``tests/support``."""
    assert not seen(imports_of_tests, trees)


def test_every_folder_is_a_room_or_about_something_else():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders = {path.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS} | {"data"}
    assert folders <= rooms | OTHER
    assert not rooms & OTHER
    assert {path.name for path in FILES if path.parent == TESTS} == LOOSE


def test_tests_that_cannot_fail_are_seen():
    tree = ast.parse("""
def looks(x): assert x
def calls(x): looks(x)
def test_left(): assert True; return
def test_left_inside():
    for x in ():
        if x: return
    assert True
def test_returns_inside_a_helper():
    def helper(): return 1
    assert helper()
def test_runs(): print(1)
def test_runs_a_helper(): calls(1)
def test_raises():
    with pytest.raises(ValueError): print(1)
def test_raises_with_a_message():
    with pytest.raises(ValueError, match="no"): print(1)
""")
    assert left_early(tree) == ["test_left", "test_left_inside"]
    assert without_assertion(tree) == ["test_runs"]
    assert without_match(tree) == ["pytest.raises(ValueError)"]
