"""The command line: ``lightning-spectral audit PATH`` and ``lightning-spectral report RUN_DIR``.

What a command needs is imported when it runs, so that help comes at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.errors import ConfigurationError, SpectralError

if TYPE_CHECKING:
    from argparse import Action

    from jsonargparse import ArgumentParser

    from lightning_spectral.records import Comparison, Measurement

__all__ = ["main"]

_OK, _ERROR, _OUTSIDE, _INTERRUPTED = 0, 2, 3, 130
_EXAMPLES = """examples:
  lightning-spectral audit model_folder              a table of every block
  lightning-spectral audit before.ckpt after.ckpt    what has changed
  lightning-spectral report runs/gpt/version_0       a page of a run"""
_OF_AUDIT = """examples:
  lightning-spectral audit model_folder
  lightning-spectral audit runs/gpt/version_0
  lightning-spectral audit before.safetensors after.safetensors --html changes.html
  lightning-spectral audit last.ckpt --fail-outside-zone --safe-zone 0.25 4

exit codes:
  0  measured
  2  not readable or not understood
  3  with --fail-outside-zone: a ratio is outside the safe zone"""
_OF_REPORT = """examples:
  lightning-spectral report runs/gpt/version_0
  lightning-spectral report runs/gpt/version_0 --output gpt.html
  lightning-spectral report runs/gpt/version_0 runs/gpt/version_1
  lightning-spectral report runs/gpt/version_0 --watch"""
_COLOURS = {"above": 31, "below": 34}  # red and blue, as in the heatmap


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; taken from ``sys.argv`` by default.

    Returns:
        The exit code: 0, 2 after an error, 3 where ``--fail-outside-zone`` was given and a ratio is outside, 130 after
        Ctrl-C.
    """
    try:
        parser = _parser()
    except ModuleNotFoundError:
        return _failed("the command line needs jsonargparse: pip install 'jsonargparse[signatures]'")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        return _audit(options.audit) if options.subcommand == "audit" else _report(options.report)
    except OSError as error:
        why = str(error.strerror or error)
        return _failed(why if error.filename is None else f"{error.filename}: {why[:1].lower()}{why[1:]}")
    except (SpectralError, ModuleNotFoundError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> ArgumentParser:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from lightning_spectral import __version__

    class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of examples, and leaves out types and defaults, which the texts have where they matter."""

        def _get_help_string(self, action: Action) -> str:
            return action.help or ""

    parser = ArgumentParser(
        prog="lightning-spectral",
        description="Spectral balance of MLP and attention in the blocks of a Transformer.",
        epilog=_EXAMPLES,
        version=__version__,
        formatter_class=Help,
    )
    command = ArgumentParser(
        description="Measure a checkpoint, or compare two.", epilog=_OF_AUDIT, formatter_class=Help
    )
    command.add_argument("path", type=str, help="checkpoint file, model folder, or folder of a run")
    command.add_argument("other", type=str | None, nargs="?", help="a second one, to compare with the first")
    command.add_argument(
        "--linearization",
        choices=("circuit", "paper"),
        default="circuit",
        help="what is measured: circuit (default) or paper",
    )
    command.add_argument("--config", type=str | None, default=None, help="config.json, if it is not beside the weights")
    command.add_argument("--key", type=str | None, default=None, help="whose weights, if the file has several models'")
    command.add_argument("--json", type=str | None, default=None, help="file to write the numbers to")
    command.add_argument(
        "--safe-zone",
        type=_number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.5, 2.0],
        help="the interval of ratios that counts as balanced (default: 0.5 2)",
    )
    command.add_argument(
        "--fail-outside-zone", action="store_true", help="exit with 3 if a ratio (of the last checkpoint) is outside"
    )
    command.add_argument("--html", type=str | None, default=None, help="file to write a page with charts to")
    page = ArgumentParser(
        description="Draw a run, also one that is still going, as one HTML file, or several over each other.",
        epilog=_OF_REPORT,
        formatter_class=Help,
    )
    page.add_argument(
        "run_dir", type=str, nargs="+", help="log directory of a run, or its spectral.jsonl; several are compared"
    )
    page.add_argument("--output", type=str | None, default=None, help="the page; beside spectral.jsonl by default")
    page.add_argument(
        "--watch",
        type=_number,
        nargs="?",
        const=10.0,
        default=None,
        help="draw again every so many seconds (10 by default) until Ctrl-C; the page loads itself again",
    )
    commands = parser.add_subcommands()
    commands.add_subcommand("audit", command, help=command.description)
    commands.add_subcommand("report", page, help=page.description)
    return parser


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"expected a number, got {text!r}") from None


def _report(options: Any) -> int:
    from lightning_spectral.pages import report, watch_report

    _check_place(options.output)
    _check_named(options.run_dir)
    runs = options.run_dir if len(options.run_dir) > 1 else options.run_dir[0]
    if options.watch is None:
        _say(sys.stdout, str(report(runs, options.output)))
    else:
        watch_report(runs, options.output, every=options.watch, tell=lambda text: _say(sys.stdout, text))
    return _OK


def _audit(options: Any) -> int:
    from lightning_spectral.checkpoints import printable
    from lightning_spectral.pages import check_installed, summary_line, write_checkpoint_page
    from lightning_spectral.records import compare
    from lightning_spectral.runs.durable import replace

    if options.html is not None:
        check_installed()  # before the work
    _check_place(options.html)
    _check_place(options.json)
    paths = [path for path in (options.path, options.other) if path is not None]
    _check_named(paths)
    measured = [_measured(path, options) for path in paths]
    if len(measured) == 1:
        result: Measurement | Comparison = measured[0]
        _show(f"{result}\n{summary_line(measured[0])}")
    else:
        result = compare(*measured)
        before, after = map(printable, paths)
        _show(f"before: {before}\nafter:  {after}\n{result}")
    if options.json is not None:
        text = json.dumps({"paths": paths, **result.to_dict()}, indent=1, allow_nan=False)
        replace(Path(options.json), f"{text}\n".encode())
    if options.html is not None:
        write_checkpoint_page(options.html, paths, measured)
    return _verdict(measured[-1], printable(paths[-1])) if options.fail_outside_zone else _OK


def _verdict(measurement: Measurement, path: str) -> int:
    """Say which blocks are outside the safe zone."""
    if all(layer.ratio is None for layer in measurement):
        return _failed(f"{path}: no block has a ratio, so none can be inside the safe zone")
    outside = [layer.index for layer in measurement if measurement.side(layer)]
    if not outside:
        return _OK
    blocks = f"block{'s' if len(outside) > 1 else ''} {', '.join(map(str, outside))}"
    _say(sys.stderr, f"lightning-spectral: {path}: outside the {measurement.zone_words}: {blocks}")
    return _OUTSIDE


def _measured(path: str, options: Any) -> Measurement:
    from lightning_spectral.checkpoints import audit

    with _progress() as advance:
        return audit(
            path,
            linearization=options.linearization,
            config=options.config,
            key=options.key,
            safe_zone=tuple(options.safe_zone),
            progress=advance,
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


def _check_named(paths: Sequence[str]) -> None:
    """Check that no path is empty, as a variable of a shell that nobody has set is."""
    if "" in paths:
        raise ConfigurationError("an empty path: name a file or a folder; for the folder that you are in, type .")


def _check_place(path: str | None) -> None:
    """Check before the work that a file can be written there."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ConfigurationError(f"{path or '.'}: cannot be written, because it is a folder; name a file")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigurationError(f"{path}: cannot be written, because its folder does not exist")


def _show(text: str) -> None:
    """Write a table to standard output, on a terminal with what is outside the safe zone in colour (no-color.org)."""
    if _is_colourful(sys.stdout):
        for side, colour in _COLOURS.items():
            text = re.sub(rf"(?m) {side}( the safe zone)?(?=$|; )", f"\x1b[{colour}m\\g<0>\x1b[0m", text)
    _say(sys.stdout, text)


def _is_colourful(stream: Any) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # none, or closed
        return False


def _failed(message: str) -> int:
    _say(sys.stderr, f"lightning-spectral: error: {message}")
    return _ERROR


def _say(stream: Any, text: str) -> None:
    """Write a line, with a question mark for each letter that the terminal does not know, if anybody reads it."""
    from lightning_spectral.records.text import writable

    try:
        stream.write(writable(text, stream) + "\n")
        stream.flush()
    except (AttributeError, OSError, ValueError):  # none, closed, or `| head`: files are written all the same
        with suppress(AttributeError, OSError, ValueError):  # and Python does not try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
