"""The reference: every public name under its topic, with its first sentence and its example.

The same list makes two pages of ``reference.md``: in a repository's browser the table and the examples, on the built
site the table and the whole docstrings.
"""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Names below the package; a class whose members say nothing new is marked in WITHOUT_MEMBERS.
TOPICS = {
    "Watch a run": ["SpectralMonitor", "Watch", "hugging_face.SpectralCallback"],
    "Measure once": ["measure", "find_blocks", "audit"],
    "Read a run": ["History", "report"],
    "Steer": [
        "GainCeiling",
        "ResidualRescaler",
        "attach_scales",
        "fuse_scales",
        "balance_init_",
        "balance_penalty",
        "scales.ResidualScales",
    ],
    "Solvers": ["RandomizedSVD", "ExactSVD"],
    "Metrics, for torchmetrics": [
        "metrics.SpectralRatio",
        "metrics.TokenResidual",
        "metrics.TokenSimilarity",
        "metrics.EffectiveRank",
        "metrics.StableRank",
    ],
    "Analysis": [
        "analysis.lyapunov_exponents",
        "analysis.LyapunovSpectrum",
        "analysis.empirical_exponents",
        "analysis.EmpiricalExponents",
        "analysis.covariance_trajectory",
        "analysis.CovarianceTrajectory",
    ],
    "Tokens": [
        "tokens.token_residual",
        "tokens.sample_residual",
        "tokens.token_similarity",
        "tokens.effective_rank",
        "tokens.stable_rank",
        "tokens.rankme",
        "tokens.participation_ratio",
        "tokens.rank_one_residual",
        "tokens.spectral_shares",
        "tokens.moment_shares",
        "tokens.shares_effective_rank",
        "tokens.massive_activations",
        "tokens.select",
    ],
    "Records": [
        "Measurement",
        "records.LayerMeasurement",
        "records.FunctionalMeasurement",
        "records.WeightSignals",
        "records.OutputMeasurement",
        "records.compare",
        "records.Comparison",
        "records.Event",
        "records.Forecast",
        "records.Blocks",
        "ResidualBlock",
        "records.Branch",
        "records.Path",
        "records.Factor",
        "records.End",
        "records.Scores",
        "records.StreamAt",
        "records.Projection",
    ],
    "Errors": [
        "SpectralError",
        "errors.BlocksNotFoundError",
        "errors.ExampleInputError",
        "errors.CheckpointError",
        "errors.ConfigurationError",
    ],
}
WITHOUT_MEMBERS = {"SpectralMonitor", "hugging_face.SpectralCallback", "GainCeiling", "ResidualRescaler"}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table of Markdown."""
    for cells in (titles, ["---"] * len(titles), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def between(text: str, name: str, table: str) -> str:
    """The text with the table between the markers of its name."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page has no place for the table {name!r}: expected {begin} and {end}, each once")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{after}"


def for_browsers() -> Iterator[str]:
    """For each topic a table with links to the source, and the example of every name that has one."""
    for topic, names in TOPICS.items():
        yield f"## {topic}\n"
        yield from table(["name", "what it is"], ([f"[`{name}`]({source(name)})", summary(name)] for name in names))
        for name in names:
            if code := example(name):
                yield f"### {name}\n\n```pycon\n{code}\n```\n"


def for_the_site() -> Iterator[str]:
    """For each topic a table with links to the docstrings, and these."""
    for topic, names in TOPICS.items():
        yield f"## {topic}\n"
        links = (f"{{py:obj}}`{name} <lightning_spectral.{name}>`" for name in names)
        yield from table(["name", "what it is"], zip(links, map(summary, names), strict=True))
        yield "```{eval-rst}"
        for name in names:
            yield f".. auto{kind(name)}:: lightning_spectral.{name}"
            yield "   :no-members:\n" if name in WITHOUT_MEMBERS else ""
        yield "```\n"


def of(name: str) -> Any:
    """The object of a name below the package."""
    room, _, last = name.rpartition(".")
    return getattr(import_module(f"lightning_spectral.{room}".rstrip(".")), last)


def kind(name: str) -> str:
    """The directive's word for the object."""
    if not inspect.isclass(of(name)):
        return "function"
    return "exception" if issubclass(of(name), Exception) else "class"


def source(name: str) -> str:
    """The path of the file that defines the object, from the page."""
    path = Path(inspect.getsourcefile(inspect.unwrap(of(name))) or "")
    return f"../{path.relative_to(ROOT).as_posix()}"


def summary(name: str) -> str:
    """The first sentence of the docstring, as Markdown."""
    return first_sentence(inspect.getdoc(of(name)) or "")


def first_sentence(text: str) -> str:
    """The text up to its first full stop, in one line, as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()).replace("``", "`"))
    return re.split(r"(?<=\.)\s", text)[0]


def example(name: str) -> str:
    """The example in the docstring, as a console shows it; empty if there is none."""
    steps = doctest.DocTestParser().get_examples(inspect.getdoc(of(name)) or "")
    return "\n".join(line for step in steps for line in shown(step))


def shown(step: doctest.Example) -> Iterator[str]:
    """The lines of one statement and of what it prints."""
    first, *others = step.source.rstrip().splitlines()
    yield f">>> {first}"
    yield from (f"... {line}".rstrip() for line in others)
    yield from step.want.rstrip().splitlines()
