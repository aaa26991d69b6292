"""Every fenced block of the documentation is run, checked, or says to the reader why it is not."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import re
import shlex
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import topics
import torch
import yaml
from pages import NOT_RUN, PAGES, ROOT, Block, blocks
from reader import brought, write_files

import lightning_spectral
from lightning_spectral.cli import main

LANGUAGES = {"python", "pycon", "bash", "yaml", "text"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# What a page writes in capitals is the reader's own.
PLACEHOLDERS = {
    "PATH": "model_folder",
    "BEFORE": "model_folder",
    "AFTER": "finetuned_folder",
    "RUN_DIR": "runs/gpt/version_0",
}
EVERY_NAME = [name for names in topics.TOPICS.values() for name in names]
PUBLIC = {name: getattr(lightning_spectral, name) for name in lightning_spectral.__all__}
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has on disk, written once."""
    folder = tmp_path_factory.mktemp("reader")
    write_files(folder)
    return folder


@pytest.fixture
def desk(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the page's own, with the reader's files; the global random stream is as it was before."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything leaves them behind
        monkeypatch.setenv(name, "0")
    with torch.random.fork_rng(devices=[]):
        yield tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_a_page_run(name: str, desk: Path):
    """One after the other, in one namespace; what stands directly below a block is what it prints."""
    namespace = brought() | {"__name__": "page"}
    for block in blocks(ROOT / name):
        assert block.language in LANGUAGES, f"{name}:{block.line} is in an unknown language"
        if block.is_run and block.language == "python":
            compare(block, run_python(block, namespace, desk))
        elif block.is_run and block.language == "bash":
            printed = [run_command(command, desk) for command in commands(block)]
            compare(block, "".join(printed))
        elif block.language == "yaml":
            check_yaml(yaml.safe_load(block.text))


@pytest.mark.parametrize("name", [name for name in EVERY_NAME if topics.example(name) or name in PUBLIC])
def test_the_example_of_a_name_prints_what_it_says(name: str, desk: Path):
    """Every name of the package itself has one, with what a reader brings along; so have functions and metrics."""
    namespace = {**PUBLIC, name.rpartition(".")[2]: topics.of(name), **brought(), "torch": torch}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(topics.of(name)) or "", namespace, name, None, None)
    assert 1 <= len(example.examples) <= 5
    said = io.StringIO()
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.write)
    assert not result.failed, said.getvalue()


def run_python(block: Block, namespace: dict[str, object], desk: Path) -> str:
    """Run a block where a traceback names its page and line; a script that a page asks to save is saved."""
    source = "\n" * (block.line - 1) + block.text
    if saved := re.search(r"[Ss]ave this as `([\w.]+)`", block.page.read_text(encoding="utf-8")):
        path = desk / saved[1]
        if not path.exists():
            path.write_text(block.text, encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(block.page), "exec"), namespace)
    return printed.getvalue()


def commands(block: Block) -> list[Sequence[str]]:
    """The commands of a block, comments left out."""
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


def run_command(words: Sequence[str], desk: Path) -> str:
    """Run our own command line; look whether what any other command names exists."""
    match list(words):
        case ["lightning-spectral", *rest]:
            return run_ours(rest)
        case ["make", target, *_]:
            assert target in TARGETS, words
        case ["pip", "install", *wanted]:
            for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", " ".join(wanted)))):
                assert extra in EXTRAS, words
        case ["python", script, *_]:
            assert (ROOT / script).exists() or (desk / script).exists(), words
        case _:
            pytest.fail(f"nobody knows how to try {shlex.join(words)!r}")
    return ""


def run_ours(words: Sequence[str]) -> str:
    """Run ``lightning-spectral``; that a ratio is outside the safe zone is an answer too."""
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        code = main([str(path) for word in words for path in in_a_shell(PLACEHOLDERS.get(word, word))])
    assert code in ({0, 3} if "--fail-outside-zone" in words else {0}), f"{words}\n{complaint.getvalue()}"
    return printed.getvalue()


def in_a_shell(word: str) -> Sequence[object]:
    """The files that a pattern stands for; any other word is itself."""
    return (sorted(Path().glob(word)) if "*" in word else None) or [word]


def compare(block: Block, printed: str) -> None:
    """Compare what was printed with the page; three dots stand for anything."""
    if block.output is None:
        return
    parts = [re.escape(part) for part in re.split(r"\.{3}", normal(block.output))]
    assert re.fullmatch(".*".join(parts), normal(printed), re.DOTALL), (
        f"{block.page.name}:{block.line} prints\n{printed}\nbut the page says\n{block.output}"
    )


def normal(text: str) -> str:
    """Leave out what no reader sees: space at the ends of lines and of the whole."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def check_yaml(node: object) -> None:
    """Every class that a file names exists, and has the arguments that it is given."""
    if isinstance(node, list):
        for item in node:
            check_yaml(item)
    elif isinstance(node, dict):
        if "class_path" in node and node["class_path"].startswith("lightning_spectral."):
            built = getattr(lightning_spectral, node["class_path"].rpartition(".")[2])
            assert set(node.get("init_args", {})) <= set(built.__init__.__annotations__)
        for item in node.values():
            check_yaml(item)


def test_a_page_that_is_wrong_is_told(desk: Path):
    """With its name and line, whether its code fails, its output differs or its command is unknown."""
    page = desk / "page.md"
    page.write_text("Words.\n\n```python\nprint(6 * 7)\n```\n\n```text\n4...1\n```\n\n```bash\nreboot\n```\n")
    code, command = blocks(page)
    printed = run_python(code, {}, desk)
    with pytest.raises(AssertionError, match=r"page\.md:4 prints\s+42\s+but the page says\s+4\.\.\.1"):
        compare(code, printed)
    compare(replace(code, output="4...\n"), printed)
    with pytest.raises(pytest.fail.Exception, match="nobody knows how to try 'reboot'"):
        run_command(*commands(command), desk)
    with pytest.raises(ZeroDivisionError, match="division by zero") as error:
        run_python(replace(code, text="1\n1 / 0\n"), {}, desk)
    assert (error.traceback[-1].path, error.traceback[-1].lineno) == (page, 4)


def test_what_is_not_run_says_why():
    """The marker is the first line of its block, gives a reason, and is rare."""
    left_out = Counter()
    for page, name in zip(PAGES, NAMES, strict=True):
        for block in blocks(page):
            if block.language in ("python", "bash") and not block.is_run:
                left_out[name] += 1
                assert len(block.text.splitlines()[0]) > len(NOT_RUN) + 8
            assert NOT_RUN.strip() not in "\n".join(block.text.splitlines()[1:]), f"{name}:{block.line}"
    assert left_out == {"docs/distributed.md": 2, "docs/report.md": 1}
