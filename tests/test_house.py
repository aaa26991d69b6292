"""The house: data flows one way, names are complete and sorted, rooms are small and well named."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import lightning_spectral

PACKAGE = Path(lightning_spectral.__file__).parent

# The floors of the house, from the ground up. A room imports only from its own floor and from floors named before it.
FLOORS = [
    {"errors", "records", "display"},  # records draw themselves
    {"durable", "settings"},
    {"linalg"},
    {"discovery", "first_forward", "geometry"},
    {"linearize", "block_outputs"},
    {"functional"},
    {"measure", "covariance", "lyapunov"},
    {"metrics", "control"},
    {"trends"},
    {"alarms"},
    {"entries", "journal", "predecessor", "series"},
    {"history"},
    {"report"},
    {"monitor"},
    {"audit"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ISOLATED = {"linalg": {"discovery", "measure", "linearize"}, "report": {"discovery", "linalg", "measure"}}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_utilities"}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(("lightning_spectral", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
]


def imports(path: Path) -> set[str]:
    """Return the full name of every module or name that a file imports, wherever the statement stands."""
    package = ".".join(("lightning_spectral", *path.relative_to(PACKAGE).parent.parts))
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rooms_imported(path: Path) -> set[str]:
    inside = {name for name in imports(path) if name.startswith("lightning_spectral.")}
    return {name.split(".")[1] for name in inside} & set(FLOOR) - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_every_room_has_a_floor_and_imports_only_downwards(path: Path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in FLOOR, f"give {room!r} a floor in this test"
    wrong = {other for other in rooms_imported(path) if FLOOR[other] > FLOOR[room]} | (
        rooms_imported(path) & ISOLATED.get(room, set())
    )
    assert not wrong, f"{room} must not import {sorted(wrong)}"


def test_an_import_that_points_the_wrong_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    for number, statement in enumerate(
        (
            "from lightning_spectral.monitor import SpectralMonitor",
            "import lightning_spectral.monitor",
            "from lightning_spectral import monitor",
            "def late():\n    from .. import monitor",
            "def late():\n    from ..monitor import SpectralMonitor",
        )
    ):
        (tmp_path / "linalg").mkdir(exist_ok=True)
        path = tmp_path / "linalg" / f"wrong{number}.py"
        path.write_text(statement)
        with pytest.raises(AssertionError, match=r"linalg must not import \['monitor'\]"):
            test_every_room_has_a_floor_and_imports_only_downwards(path)


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_only_the_monitor_imports_lightning(path: Path):
    used = {name.split(".")[0] for name in imports(path)} & FRAMEWORKS
    assert not used or room_of(path) in {"monitor", "cli"}


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_no_private_attribute_of_the_trainer_is_read(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert "trainer" not in ast.unparse(node.value), ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_exported_names_are_sorted_and_exist(name: str):
    module = importlib.import_module(name)
    names = module.__all__
    assert list(names) == sorted(set(names))
    assert all(hasattr(module, exported) for exported in names)


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_exported_names_are_complete(path: Path):
    """What is defined without an underscore is exported; constants and type aliases need not be."""
    if path.name == "__init__.py":
        return
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
    assert defined <= set(exported)


def test_the_public_names_are_these():
    assert lightning_spectral.__all__ == [
        "BlocksNotFoundError",
        "Branch",
        "CheckpointError",
        "ConfigurationError",
        "EffectiveRank",
        "ExactSVD",
        "ExampleInputError",
        "GainCeiling",
        "History",
        "LayerMeasurement",
        "Measurement",
        "RandomizedSVD",
        "ResidualBlock",
        "ResidualRescaler",
        "ResidualScales",
        "SpectralError",
        "SpectralMonitor",
        "SpectralRatio",
        "StableRank",
        "TokenResidual",
        "TokenSimilarity",
        "attach_scales",
        "audit",
        "balance_init_",
        "balance_penalty",
        "covariance_trajectory",
        "find_blocks",
        "fuse_scales",
        "heatmap",
        "lyapunov_exponents",
        "measure",
        "read_actions",
        "read_events",
        "read_journal",
        "report",
    ]


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_no_room_is_called_after_nothing(path: Path):
    assert not FORBIDDEN_NAMES & {part.strip("_") for part in path.relative_to(PACKAGE).with_suffix("").parts}


def test_the_package_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    changelog = PACKAGE.parent / "CHANGELOG.md"
    released = lightning_spectral.__version__.partition(".dev")[0]
    assert f"## {released}" in changelog.read_text() or ".dev" in lightning_spectral.__version__
    assert f"version: {lightning_spectral.__version__}\n" in (PACKAGE.parent / "CITATION.cff").read_text()
