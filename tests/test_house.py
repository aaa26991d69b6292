"""The house: data flows one way, no two rooms need each other, names are complete and sorted, files are well named."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_spectral

PACKAGE = Path(lightning_spectral.__file__).parent

# From the ground up. A room imports only from its own floor and from floors named before it.
FLOORS = [
    *("errors", "_checks", "display", "records", "linalg", "passes", "weights"),
    *("discovery.trace", "discovery.chains", "discovery.structure", "discovery"),
    *("tokens", "measuring", "analysis", "metrics", "scales", "control", "balance"),
    *("alarms", "runs", "pages", "checkpoints", "watch", "monitor", "hugging_face", "cli"),
]
LOOSE = {"__init__", "_checks", "cli", "errors", "hugging_face"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_utilities"}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(("lightning_spectral", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
]
PAIRS = list(zip(FILES, MODULES, strict=True))


@functools.cache
def imports(path: Path) -> set[str]:
    """Return the full name of every module or name that a file imports, wherever the statement stands."""
    package = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).parent.parts))
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def modules_imported(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, by the longest name that is one."""
    known = set(MODULES)
    found = set()
    for name in imports(path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", "lightning_spectral"}


def room_of(module: str) -> str:
    names = module.split(".")[1:]
    return next(".".join(names[:depth]) for depth in (2, 1) if ".".join(names[:depth]) in FLOORS)


def wrong_arrows(path: Path, room: str) -> set[str]:
    """Return the rooms above its own that a file imports from."""
    names = {name.removeprefix("lightning_spectral.") for name in imports(path) if name.startswith(PACKAGE.name + ".")}
    rooms = {
        next((".".join(name.split(".")[:d]) for d in (2, 1) if ".".join(name.split(".")[:d]) in FLOORS), "")
        for name in names
    }
    return {other for other in rooms - {"", room} if FLOORS.index(other) > FLOORS.index(room)}


def test_every_room_has_a_floor_and_imports_only_downwards():
    inside = PAIRS[1:]  # without the front door
    assert not {module: wrong for path, module in inside if (wrong := wrong_arrows(path, room_of(module)))}


def test_an_import_that_points_the_wrong_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "lightning_spectral"
    monkeypatch.setitem(globals(), "PACKAGE", package)
    (package / "linalg").mkdir(parents=True)
    for number, statement in enumerate(
        (
            "from lightning_spectral.monitor import SpectralMonitor",
            "import lightning_spectral.monitor",
            "from lightning_spectral import monitor",
            "def late():\n    from .. import monitor",
            "def late():\n    from ..monitor import SpectralMonitor",
            "if TYPE_CHECKING:\n    from lightning_spectral.monitor.callback import SpectralMonitor",
        )
    ):
        path = package / "linalg" / f"wrong{number}.py"
        path.write_text(statement)
        assert wrong_arrows(path, "linalg") == {"monitor"}


def test_no_modules_import_each_other_not_even_for_type_hints():
    graph = {module: modules_imported(path) - {module} for path, module in zip(FILES, MODULES, strict=True)}
    # A room's own door imports what is in it, and what is in it must not come back through the door.
    assert set(TopologicalSorter(graph).static_order()) == {*MODULES}


def test_a_circle_is_seen():
    with pytest.raises(CycleError, match="nodes are in a cycle"):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_nothing_is_loose_at_the_top():
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


def test_no_two_files_have_one_name():
    counts = Counter(path.stem for path in FILES if path.stem != "__init__")
    assert not {name for name, count in counts.items() if count > 1}


def test_no_name_hides_a_module():
    doors = [importlib.import_module(module) for path, module in PAIRS if path.stem == "__init__"]
    modules = {door.__name__: {name for _, name, _ in pkgutil.iter_modules(door.__path__)} for door in doors}
    assert not {door.__name__: hidden for door in doors if (hidden := modules[door.__name__] & set(door.__all__))}


def test_only_the_monitor_imports_lightning():
    used = {module: {name.split(".")[0] for name in imports(path)} & FRAMEWORKS for path, module in PAIRS}
    assert {room_of(module) for module in used if used[module]} <= {"monitor", "cli"}


def test_no_private_attribute_of_the_trainer_is_read():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert "trainer" not in ast.unparse(node.value), (path, ast.unparse(node))


def test_exported_names_are_sorted_and_exist():
    for module in map(importlib.import_module, MODULES):
        names = module.__all__
        assert list(names) == sorted(set(names)), module
        assert all(hasattr(module, exported) for exported in names), module


def test_exported_names_are_complete():
    """What is defined without an underscore is exported; constants and type aliases need not be."""
    for path in (path for path in FILES if path.stem != "__init__"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        (exported,) = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert defined <= set(exported), path


def test_no_room_is_called_after_nothing():
    names = {part.strip("_") for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not FORBIDDEN_NAMES & names


def test_the_package_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    changelog = PACKAGE.parent / "CHANGELOG.md"
    released = lightning_spectral.__version__.partition(".dev")[0]
    assert f"## {released}" in changelog.read_text() or ".dev" in lightning_spectral.__version__
    assert f"version: {lightning_spectral.__version__}\n" in (PACKAGE.parent / "CITATION.cff").read_text()


# The front door.

PUBLIC = [
    *("ExactSVD", "GainCeiling", "History", "Measurement", "RandomizedSVD", "ResidualBlock", "ResidualRescaler"),
    *("SpectralError", "SpectralMonitor", "Watch", "attach_scales", "audit", "balance_init_", "balance_penalty"),
    *("find_blocks", "fuse_scales", "measure", "report"),
]
HEAVY = ["lightning", "pytorch_lightning", "torchmetrics", "transformers", "matplotlib", "bokeh", "pandas"]


def loaded(statement: str) -> set[str]:
    """Return the modules that a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.splitlines()[-1].split())


def test_the_public_names_are_these():
    assert lightning_spectral.__all__ == PUBLIC
    rooms = {"analysis", "errors", "hugging_face", "metrics", "records", "scales"}
    assert set(dir(lightning_spectral)) == {*PUBLIC, *rooms, "__version__"}
    assert all(callable(getattr(lightning_spectral, name)) for name in PUBLIC)


def test_public_rooms_are_there_without_another_import():
    assert loaded("import lightning_spectral as s; s.metrics.TokenResidual; s.errors.ConfigurationError")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("ConfigurationError", "it is lightning_spectral.errors.ConfigurationError now"),
        ("lyapunov_exponents", "it is lightning_spectral.analysis.lyapunov_exponents now"),
        ("read_journal", r"use History.read\(path\).measurements"),
        ("mesure", r"has no attribute 'mesure'$"),
    ],
)
def test_a_name_that_is_not_there_says_where_it_went(name: str, remedy: str):
    with pytest.raises(AttributeError, match=remedy):
        getattr(lightning_spectral, name)


def test_the_door_loads_nothing():
    assert not loaded("import lightning_spectral") & {*HEAVY, "torch", "numpy"}


def test_no_name_but_the_callback_loads_a_framework():
    names = ", ".join(name for name in PUBLIC if name != "SpectralMonitor")
    assert not loaded(f"from lightning_spectral import {names}") & set(HEAVY)


def test_help_loads_neither_torch_nor_a_framework():
    code = (
        "import contextlib\nfrom lightning_spectral.cli import main\nwith contextlib.suppress(SystemExit): main(['-h'])"
    )
    assert not loaded(code) & {*HEAVY, "torch"}
