"""The notebook runs from its first cell to its decision, and shows what it printed when it was written."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "from_a_model_to_a_decision.ipynb"


def test_the_notebook_comes_to_its_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything leaves them behind
        monkeypatch.setenv(name, "0")
    namespace: dict[str, Any] = {}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec("".join(cell["source"]), namespace)
            shown = "".join(text for output in cell["outputs"] for text in output["text"])
            assert bool(printed.getvalue()) == bool(shown), "run the notebook and save it"
    healthy, decision = namespace["healthy"], namespace["decision"]
    assert decision == "norms in front" == shown.strip()
    assert "as it was" not in healthy
