"""``lightning-spectral audit``: what it writes where, and with which code it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import example

import lightning_spectral
from lightning_spectral import attach_scales, audit, find_blocks, measure
from lightning_spectral.cli import main
from lightning_spectral.records.plain import to_plain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model: Any = example("llama").build()
    model.save_pretrained(path)
    return path


def changed(folder: Path, target: Path, factor: float, attention: float = 1.0) -> Path:
    """The same model with larger MLP branches, and with larger attention."""
    model: Any = example("llama").build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(factor)
            layer.self_attn.v_proj.weight.mul_(attention)
    model.save_pretrained(target)
    return target


def test_one_checkpoint_is_a_table_and_a_file_of_numbers(folder: Path, tmp_path: Path, capsys: Any):
    assert main(["audit", str(folder), "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *table, summary = out.splitlines()
    assert table == str(audit(folder)).splitlines()
    assert re.fullmatch(r"min .*, median .*, max .*; \d of 3 blocks inside the safe zone; measured in \d+ ms", summary)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["paths"] == [str(folder)]
    assert written["layers"] == json.loads(json.dumps(audit(folder).to_dict()))["layers"]
    assert main(["audit", str(folder), "--linearization", "paper"]) == 0
    assert "linearization='paper'" in capsys.readouterr().out


@pytest.mark.parametrize("stream", ["none", "closed", "broken"])
def test_files_are_written_where_nobody_reads_the_table(
    folder: Path, tmp_path: Path, stream: str, monkeypatch: pytest.MonkeyPatch
):
    reader, writer = os.pipe()
    out = None if stream == "none" else os.fdopen(writer, "w")
    os.close(reader)
    if out is not None and stream == "closed":
        out.close()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["audit", str(folder), "--json", str(tmp_path / "out.json")]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["layers"]) == 3
    if out is not None:
        out.close()  # does not fail again


def test_two_checkpoints_are_a_table_of_changes(folder: Path, tmp_path: Path, capsys: Any):
    other = changed(folder, tmp_path / "other", 2.0)
    assert main(["audit", str(folder), str(other), "--json", str(tmp_path / "out.json")]) == 0
    named_before, named_after, title, _, *rows, summary = capsys.readouterr().out.splitlines()
    assert (named_before, named_after) == (f"before: {folder}", f"after:  {other}")
    assert title == "before → after, linearization='circuit', safe zone (0.5, 2)"
    assert [row.split()[11] for row in rows] == ["×2"] * 3
    assert max(map(len, rows)) <= 80
    assert re.fullmatch(r"largest change: block \d \(model\.layers\.\d\), ratio ×2, by its MLP", summary)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["log_ratio_change"] == pytest.approx([0.693147] * 3, abs=1e-5)
    assert len(written["before"]["layers"]) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [((1e-12, 1e9), (1e9, 1e-12)), ((3.3e-12, 1.0), (3.3e-6, 1.0)), ((1234.5, 1e-4), (1.0, 98765.0))],
)
def test_a_comparison_of_extreme_norms_has_80_columns(
    folder: Path,
    tmp_path: Path,
    before: tuple[float, float],
    after: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
):
    """Numbers lose digits before the names of blocks become unreadable, and long lines are broken."""
    monkeypatch.chdir(tmp_path)
    changed(folder, Path("a"), *before), changed(folder, Path("b"), *after)
    assert main(["audit", "a", "b", "--safe-zone", "1.23456e-5", "123456.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"^  0  (model\.layers|…[\w.]*)\.0 .* → .* → .* → .* ×", lines[4])
    assert re.search(r"largest change: block \d \(model\.layers\.\d\), ratio ×[\d.e+-]+, by ", " ".join(lines))


def test_the_exit_code_says_whether_a_ratio_is_outside(folder: Path, tmp_path: Path, capsys: Any):
    model: Any = example("llama").build()
    ratios = [layer.ratio or 0.0 for layer in measure(model)]
    inside = changed(folder, tmp_path / "inside", 1 / (min(ratios) * max(ratios)) ** 0.5)
    outside = changed(folder, tmp_path / "outside", 100.0)
    assert main(["audit", str(inside), "--fail-outside-zone"]) == 0
    assert main(["audit", str(outside)]) == 0
    assert main(["audit", str(outside), "--fail-outside-zone"]) == 3
    assert main(["audit", str(outside), str(inside), "--fail-outside-zone"]) == 0  # the last one counts
    assert main(["audit", str(inside), str(outside), "--fail-outside-zone"]) == 3
    out, err = capsys.readouterr()
    assert out.count("→ above") == 3
    assert err.splitlines()[-1] == f"lightning-spectral: {outside}: outside the safe zone (0.5, 2): blocks 0, 1, 2"
    assert main(["audit", str(outside), "--fail-outside-zone", "--safe-zone", "0.001", "1e6"]) == 0
    assert "safe zone (0.001, 1e+06)" in capsys.readouterr().out
    assert main(["audit", str(outside), "--safe-zone", "2", "0.5"]) == 2
    assert "safe_zone=(2.0, 0.5): expected" in capsys.readouterr().err


def test_what_is_not_finite_is_null_with_its_reason(tmp_path: Path, capsys: Any):
    """A scale that has become NaN or infinite, and weights that have: JSON knows neither."""
    model: Any = example("gpt2").build()
    blocks = find_blocks(model)
    scales = attach_scales(model, blocks).parameters()
    with torch.no_grad():
        scales[0].fill_(float("nan"))
        scales[2].fill_(1e30)
        model.transformer.h[2].mlp.c_fc.weight[0, 0] = float("inf")
    left = {"callbacks": {"monitor": {"blocks": to_plain(blocks)}}}
    torch.save({"state_dict": model.state_dict()} | left, tmp_path / "a.ckpt")
    outputs = [str(tmp_path / name) for name in ("one.json", "two.json")]
    assert main(["audit", str(tmp_path / "a.ckpt"), "--json", outputs[0]]) == 0
    assert main(["audit", str(tmp_path / "a.ckpt"), str(tmp_path / "a.ckpt"), "--json", outputs[1]]) == 0
    assert "weights are not finite" in capsys.readouterr().out
    one, two = (json.loads(Path(path).read_text(), parse_constant=pytest.fail) for path in outputs)
    assert one["layers"] == two["before"]["layers"] == two["after"]["layers"]
    for layer, kind in ((0, "attention"), (1, "attention"), (2, "mlp")):
        found = one["layers"][layer]
        assert found[f"{kind}_norm"] is found["ratio"] is None
        assert f"{kind}: weights are not finite" in found["reason"]
    assert [one["layers"][layer]["attention_scale"] for layer in range(3)] == [None, None, 1.0]


def test_a_key_chooses_and_notes_are_shown(tmp_path: Path, capsys: Any):
    model: Any = example("llama").build()
    model.config.architectures = [type(model).__name__]
    model.config.num_hidden_layers = 2
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    torch.save({"model": state, "ema": {key: 2 * value for key, value in state.items()}}, tmp_path / "a.pt")
    path = str(tmp_path / "a.pt")
    assert main(["audit", path]) == 2
    assert "audit(path, key='ema' or key='model'), or --key on the command line" in capsys.readouterr().err
    assert main(["audit", path, "--key", "ema", "--json", str(tmp_path / "out.json")]) == 0
    note = "matrices of the file belong to none of 2 blocks, though their like do: model.layers.2"
    assert note in capsys.readouterr().out.splitlines()[-2]
    assert note in json.loads((tmp_path / "out.json").read_text())["notes"][0]
    assert main(["audit", path, path, "--key", "ema", "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n  ", " ").count(note) == 2  # of the one before, and of the one after
    assert note in (tmp_path / "page.html").read_text()


def test_no_ratio_is_not_inside_the_zone(tmp_path: Path, capsys: Any):
    model: Any = example("fnet").build()  # its mixer has no weights
    model.save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path)]) == 0
    assert main(["audit", str(tmp_path), "--fail-outside-zone"]) == 2
    assert "no block has a ratio, so none can be inside the safe zone" in capsys.readouterr().err


def test_errors_are_one_line_and_code_2(folder: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "\x1b[31mred.pt").write_bytes(b"nothing")
    for arguments, message in (
        (["audit", str(tmp_path / "absent")], "no such file"),
        (["audit", str(tmp_path / "\x1b[31mred.pt")], "not readable as a file of torch.save"),
        (["audit", str(folder), str(tmp_path)], "found no weights in this folder"),
        (["audit", str(folder), "--config", str(tmp_path)], "config.json: no such file or directory"),
        (["audit", str(folder), "--json", str(tmp_path / "no" / "out.json")], "its folder does not exist"),
        (["audit", str(folder), "--html", str(tmp_path / "no" / "out.html")], "its folder does not exist"),
        (["report", str(tmp_path), "--output", str(tmp_path / "no" / "out.html")], "its folder does not exist"),
        (["audit", str(folder), "--json", str(tmp_path)], f"{tmp_path}: cannot be written, because it is a folder"),
        (["audit", str(folder), "--html", str(tmp_path)], f"{tmp_path}: cannot be written, because it is a folder"),
        (["report", str(folder), "--output", ""], ".: cannot be written, because it is a folder; name a file"),
        (["report", str(tmp_path), "--watch", "inf"], "inf s between two looks at a run: expected more than 0 and at"),
        (["report", str(tmp_path), "--watch", "nan"], "nan s between two looks at a run: expected more than 0 and at"),
        (["report", str(tmp_path), "--watch", "-3"], "-3 s between two looks at a run: expected more than 0 and at"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""  # told before the work
        assert err.startswith("lightning-spectral: error: ")
        assert err.endswith("\n")
        assert err[:-1].isprintable()
        assert message in err


def test_help_has_examples_and_no_noise_and_the_version_is_that_of_the_package(capsys: Any):
    for arguments, expected in (
        (["--help"], "examples:\n  lightning-spectral audit model_folder"),
        (["audit", "--help"], "exit codes:\n  0  measured\n"),
        (["report", "--help"], "examples:\n  lightning-spectral report runs/gpt/version_0\n"),
        (["--version"], f"lightning-spectral {lightning_spectral.__version__}\n"),
    ):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(arguments)
        out = capsys.readouterr().out
        assert expected in out
        assert "null" not in out
        assert "type:" not in out


@pytest.mark.parametrize("arguments", [[], ["audit"], ["audit", "a", "--linearization", "none"], ["draw", "a"]])
def test_what_is_no_command_ends_with_2(arguments: list[str], capsys: Any):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert "usage: lightning-spectral" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "a", "--linearization", "jacobian"], "argument --linearization: invalid choice: 'jacobian'"),
        (["audit", "a", "--safe-zone", "0.5", "b"], "argument --safe-zone: expected a number, got 'b'"),
        (["report", "a", "--watch", "b"], "argument --watch: expected a number, got 'b'"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(arguments: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize("arguments", [["report", ""], ["report", "a", ""], ["audit", ""], ["audit", "a", ""]])
def test_an_empty_path_is_not_the_folder_that_one_is_in(arguments: list[str], capsys: Any):
    assert main(arguments) == 2
    expected = "an empty path: name a file or a folder; for the folder that you are in, type .\n"
    assert capsys.readouterr().err == f"lightning-spectral: error: {expected}"


def test_a_config_that_is_not_there_is_told_as_such(folder: Path, capsys: Any):
    assert main(["audit", str(folder), "--config", "missing.json"]) == 2
    assert capsys.readouterr().err == "lightning-spectral: error: missing.json: no such file or directory\n"


def test_ctrl_c_ends_an_audit_without_a_traceback(folder: Path):
    script = (
        "import sys\nfrom lightning_spectral import cli, checkpoints\ndef audit(*_, **__): raise KeyboardInterrupt\n"
    )
    script += "checkpoints.audit = audit\nsys.exit(cli.main(['audit', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_without_the_extra_the_message_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["audit", "anything"]) == 2
    assert "the command line needs jsonargparse: pip install 'jsonargparse[signatures]'" in capsys.readouterr().err


def test_without_transformers_or_safetensors_the_message_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["audit", str(folder)]) == 2
    assert "needs the package transformers: pip install transformers" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["audit", str(folder)]) == 2
    assert "needs the package safetensors: pip install safetensors" in capsys.readouterr().err


def test_the_entry_point_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"lightning-spectral": "lightning_spectral.cli:main"}


def test_a_bar_is_drawn_on_a_terminal_and_never_in_a_pipe(folder: Path):
    """In a process of its own, with standard error on a pseudo terminal and then in a pipe."""
    code = f"import sys; from lightning_spectral.cli import main; sys.exit(main(['audit', {str(folder)!r}]))"
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=True)
    assert piped.stderr == b""
    assert piped.stdout.startswith(b"spectral ratio ?mlp??/?attention??")
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, env=environment)
    os.close(child)
    drawn = bytearray()

    def read() -> None:  # all along: a terminal that nobody reads is full after some pages, and holds the process up
        with contextlib.suppress(OSError):  # the end of a pseudo terminal
            while part := os.read(parent, 4096):
                drawn.extend(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    out, _ = process.communicate(timeout=120)
    reader.join(timeout=10)
    os.close(parent)
    assert process.returncode == 0
    assert b"blocks" in drawn
    assert without_time(out) == without_time(piped.stdout)


def without_time(out: bytes) -> bytes:
    return re.sub(rb"measured in \d+ ms", b"", out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm")])
def test_a_terminal_has_colours_unless_the_user_wants_none(
    folder: Path, tmp_path: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    outside = changed(folder, tmp_path / "outside", 100.0)
    assert main(["audit", str(outside)]) == 0
    assert main(["audit", str(folder), str(outside)]) == 0
    coloured = value == "xterm"
    assert out.getvalue().count("\x1b[31m above the safe zone\x1b[0m") == 3 * coloured
    assert out.getvalue().count("→\x1b[31m above\x1b[0m\n") == 3 * coloured
    assert ("\x1b" in out.getvalue()) == coloured


def test_of_the_folder_of_a_run_the_newest_checkpoint_is_read(tmp_path: Path, capsys: Any):
    model: Any = example("gpt2").build()
    blocks = to_plain(find_blocks(model))
    saved = tmp_path / "checkpoints"
    saved.mkdir()
    for number, name in enumerate(("epoch=9.ckpt", "last.ckpt", "epoch=10.ckpt")):
        kept = {"global_step": number, "callbacks": {"monitor": {"blocks": blocks}}}
        torch.save({"state_dict": model.state_dict()} | kept, saved / name)
        os.utime(saved / name, (number, number))
    for path, note in ((tmp_path, "checkpoints/epoch=10.ckpt"), (saved, "epoch=10.ckpt")):
        assert main(["audit", str(path)]) == 0
        out = capsys.readouterr().out
        assert "step 2" in out
        assert f"note: {note} was read, the newest of 3 checkpoints\n" in out
    (tmp_path / "model.safetensors").write_bytes(b"weights of something else count first")
    assert main(["audit", str(tmp_path)]) == 2
    (tmp_path / "spectral.jsonl").write_text("{}")
    shutil.rmtree(saved)
    (tmp_path / "model.safetensors").unlink()
    assert main(["audit", str(tmp_path)]) == 2
    assert "no checkpoint of it; lightning-spectral report FOLDER draws the run" in capsys.readouterr().err
