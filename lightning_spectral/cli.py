"""The command line: ``lightning-spectral audit PATH`` and ``lightning-spectral report RUN_DIR``.

What a command needs is imported when it runs, so that help comes at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_spectral.errors import SpectralError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lightning_spectral.records import Comparison, Measurement

__all__ = ["main"]

_OK, _ERROR, _OUTSIDE = 0, 2, 3
_EPILOG = "exit codes: 0 measured; 2 not readable or not understood; 3 a ratio is outside the safe zone"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; taken from ``sys.argv`` by default.

    Returns:
        The exit code: 0, 2 after an error, 3 where ``--fail-outside-zone`` was given and a ratio is outside.
    """
    try:
        parser = _parser()
    except ModuleNotFoundError:
        return _failed("the command line needs jsonargparse: pip install 'jsonargparse[signatures]'")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        return _audit(options.audit) if options.subcommand == "audit" else _report(options.report)
    except (SpectralError, OSError, ModuleNotFoundError) as error:
        return _failed(str(error))


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-spectral", description="Spectral balance of MLP and attention.")
    command = ArgumentParser(description="Measure a checkpoint file, or compare two of them.", epilog=_EPILOG)
    command.add_argument("path", type=str, help="file or model folder")
    command.add_argument("other", type=str | None, nargs="?", help="a second one, to compare with the first")
    command.add_argument(
        "--linearization", type=Literal["circuit", "paper"], default="circuit", help="what is measured"
    )
    command.add_argument("--config", type=str | None, default=None, help="config.json, if it is not beside the weights")
    command.add_argument("--key", type=str | None, default=None, help="whose weights, if the file has several models'")
    command.add_argument("--json", type=str | None, default=None, help="file to write the numbers to")
    command.add_argument(
        "--fail-outside-zone", action="store_true", help="exit with 3 if a ratio (of the last checkpoint) is outside"
    )
    command.add_argument("--html", type=str | None, default=None, help="file to write a page with charts to")
    page = ArgumentParser(description="Draw a run, also one that is still going, as one HTML file.")
    page.add_argument("run_dir", type=str, help="log directory of the run, or its spectral.jsonl")
    page.add_argument("--output", type=str | None, default=None, help="the page; beside spectral.jsonl by default")
    commands = parser.add_subcommands()
    commands.add_subcommand("audit", command, help=command.description)
    commands.add_subcommand("report", page, help=page.description)
    return parser


def _report(options: Any) -> int:
    from lightning_spectral.pages import report

    _say(sys.stdout, str(report(options.run_dir, options.output)))
    return _OK


def _audit(options: Any) -> int:
    from lightning_spectral.checkpoints import printable
    from lightning_spectral.pages import check_installed, write_checkpoint_page
    from lightning_spectral.records import compare
    from lightning_spectral.runs.durable import replace

    if options.html is not None:
        check_installed()  # before the work
    paths = [path for path in (options.path, options.other) if path is not None]
    measured = [_measured(path, options) for path in paths]
    result: Measurement | Comparison = measured[0] if len(measured) == 1 else compare(*measured)
    _say(sys.stdout, str(result))
    if options.json is not None:
        text = json.dumps({"paths": paths, **result.to_dict()}, indent=1, allow_nan=False)
        replace(Path(options.json), f"{text}\n".encode())
    if options.html is not None:
        write_checkpoint_page(options.html, paths, measured)
    ratios = [layer.ratio for layer in measured[-1] if layer.ratio is not None]
    low, high = measured[-1].safe_zone
    if not options.fail_outside_zone:
        return _OK
    if not ratios:
        return _failed(f"{printable(paths[-1])}: no block has a ratio, so none can be inside the zone")
    return _OK if all(low < ratio < high for ratio in ratios) else _OUTSIDE


def _measured(path: str, options: Any) -> Measurement:
    from lightning_spectral.checkpoints import audit

    with _progress() as advance:
        return audit(
            path, linearization=options.linearization, config=options.config, key=options.key, progress=advance
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar with the time that remains, on a terminal only."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("blocks", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _failed(message: str) -> int:
    _say(sys.stderr, f"lightning-spectral: error: {message}")
    return _ERROR


def _say(stream: Any, text: str) -> None:
    """Write a line, with a question mark for each letter that the terminal does not know, if anybody reads it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()
    except (AttributeError, OSError, ValueError):  # none, closed, or `| head`: files are written all the same
        with suppress(AttributeError, OSError, ValueError):  # and Python does not try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
