"""Tables that nobody types: supported architectures, from the tests; logged keys and the reference, from the code.

``make tables`` writes them into the pages between ``<!-- begin: name -->`` and ``<!-- end: name -->``. They are
committed, so that a repository's browser shows them; ``tests/docs/test_tables.py`` fails when one is stale.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import topics
import zoo
from topics import between, first_sentence, table
from zoo import Example, hugging_face
from zoo.reasons import CROSS, expected_reasons, has_ratio

from lightning_spectral import Measurement, SpectralMonitor
from lightning_spectral.alarms import Memory
from lightning_spectral.records import FunctionalMeasurement, LayerMeasurement, OutputMeasurement, WeightSignals
from lightning_spectral.runs.series import logged_values

DOCS = Path(__file__).parent

NORMS = {
    "pre": "in front",
    "post": "behind the add",
    "sandwich": "in front and behind",
    "branchpost": "behind the branch",
    "par": "in front, parallel",
    "none": "none",
    "after_norm": "in front, skip included",
}


HEADINGS = {
    "unseen": "Hugging Face, not seen before",
    "torch_layers": "Layers of torch.nn",
    "plain": "Plain PyTorch",
    "fused": "Layouts of fused and grouped projections",
    "experts": "Mixtures of experts",
    "adapters": "Low-rank adapters",
    "arrangements": "Arrangements",
    "vision": "Pictures and latents",
    "wrappers": "Wrappers",
    "refused": "Refused",
}


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that has tables, and its text with tables that are up to date."""
    made = {"architectures": architectures(), "keys": keys(), "reference": topics.for_browsers()}
    for name, lines in made.items():
        path = DOCS / f"{name}.md"
        yield path, between(path.read_text(encoding="utf-8"), name, "\n".join(lines))


# --- Architectures ----------------------------------------------------------------------------------------------------


def sections() -> dict[str, list[Example]]:
    """Every member of the zoo under the heading of its module, the others' under their own name."""
    found = {"Hugging Face, surveyed": hugging_face.surveyed()}
    modules = {name: module for name, module in vars(zoo).items() if hasattr(module, "members")}
    for name in sorted(modules, key=[*HEADINGS, *modules].index):
        found[HEADINGS.get(name, name.replace("_", " ").capitalize())] = modules[name].members()
    missing = {member.name for member in zoo.examples()} - {member.name for part in found.values() for member in part}
    if missing:
        raise ValueError(f"give these members of the zoo a heading: {sorted(missing)}")
    return found


def architectures() -> Iterator[str]:
    """The counts, then a table per section."""
    everything = zoo.examples()
    yield from table(
        ["", "models", "a ratio in every block", "in some blocks", "in none", "refused"], counts(everything)
    )
    for heading, members in sections().items():
        yield f"## {heading}\n"
        own = not heading.startswith("Hugging Face")
        if heading == "Refused":
            yield from table(["model", "why"], ([f"`{member.name}`", member.note] for member in members))
        else:
            titles = ["model", "norms", "branches", "blocks with a ratio", "why not the others"]
            yield from table([*titles, *(["remark"] if own else [])], (row(member, own=own) for member in members))


def counts(everything: Sequence[Example]) -> Iterator[list[str]]:
    """How many models have a ratio in all, some or none of their blocks."""
    groups = {
        "surveyed architectures": [member for member in everything if member.survey],
        "all others": [member for member in everything if not member.survey],
    }
    for title, members in groups.items():
        shares = [share(member) for member in members if not member.expected_refusal]
        found = [sum(test) for test in zip(*((s == 1, 0 < s < 1, s == 0) for s in shares), strict=True)]
        refusals = sum(member.expected_refusal for member in members)
        yield [title, *map(str, (len(members), *found, refusals))]


def share(member: Example) -> float:
    """Fraction of the blocks that have a ratio."""
    return sum(has_ratio(member, block) for block in member.blocks) / len(member.blocks)


def row(member: Example, *, own: bool) -> list[str]:
    """One model."""
    blocks, measured = len(member.blocks), sum(has_ratio(member, block) for block in member.blocks)
    reasons = [reason for reason in expected_reasons(member.name) if reason != CROSS]
    if not reasons and measured < blocks:
        reasons = ["one branch: there is nothing to compare it with"]
    cells = [
        called(member),
        NORMS[member.norm_scheme],
        ", ".join(dict.fromkeys(kind for block in member.blocks for kind in kinds(block))),
        f"{measured} of {blocks}",
        "; ".join(reasons) if measured < blocks else "",
    ]
    return [*cells, *([member.note] if own else [])]


def kinds(block: zoo.ExpectedBlock) -> Iterator[str]:
    """The kinds of the branches of a block; where two words are accepted, both."""
    if block.attention is not None:
        yield " or ".join(block.kinds)
    yield from (kind.replace("_", "-") for kind in block.other_kinds)
    if block.mlp is not None:
        yield "mlp"


def called(member: Example) -> str:
    """The name of a member; before it, the class of a Hugging Face model."""
    built = getattr(inspect.unwrap(member.build), "args", ())
    classes = [f"`{argument}`" for argument in built if isinstance(argument, str)]
    return f"{classes[0]} ({member.name})" if classes else f"`{member.name}`"


# --- Keys -------------------------------------------------------------------------------------------------------------


def keys() -> Iterator[str]:
    """Every key that a run can log, what it needs, and what the docstrings say that it is."""
    units = documented_keys()
    plain_run = logged(geometry=False, rescaled=None, per_layer=False)
    yield from key_table("Always", plain_run, units)
    yield from key_table("With `geometry=True`", logged(geometry=True) - plain_run, units)
    steered = logged(rescaled=1) - plain_run
    yield from key_table("With `auto_rescale=True`", steered, units)
    left = set(units) - plain_run - steered - logged(geometry=True)
    if left:
        raise ValueError(f"the docstring of SpectralMonitor has keys that nothing logs: {sorted(left)}")
    everything = logged(geometry=True, rescaled=1, per_layer=True) - logged(geometry=True, rescaled=1)
    yield "## With `per_layer=True`\n"
    rows = ([f"`{key}`", meaning_of_layer(key.split("/")[1])] for key in sorted(everything, key=in_order))
    yield from table(["key, of block 7", "meaning"], rows)


def key_table(heading: str, names: set[str], units: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """The keys of one setting, in the order of the docstring."""
    undocumented = names - set(units)
    if undocumented:
        raise ValueError(f"the docstring of SpectralMonitor does not explain {sorted(undocumented)}")
    yield f"## {heading}\n"
    yield from table(["key", "unit", "meaning"], ([f"`{key}`", *units[key]] for key in units if key in names))


def logged(*, geometry: bool = False, rescaled: int | None = None, per_layer: bool = False) -> set[str]:
    """The keys that are logged of a block in which everything was measured."""
    seen: dict[str, Any] = {}
    if geometry:
        update = FunctionalMeasurement(update_ratio=1.0, attention_logit=3.0)
        seen = {"token_residual": 0.5, "effective_rank": 4.0, "sample_residual": 0.5, "functional": update}
    if per_layer:
        names = [item.name for item in fields(WeightSignals) if not item.name.endswith("_moved")]
        seen["weights"] = WeightSignals(**dict.fromkeys(names, 1.0))
    layer = LayerMeasurement(7, "blocks.7", 1.0, 1.0, **seen)
    output = OutputMeasurement(0.5, pooled_residual=0.5) if geometry else None
    measurement = Measurement(0, "circuit", (layer,), output=output)
    return set(logged_values(measurement, Memory(), "spectral", per_layer=per_layer, rescaled=rescaled))


def documented_keys() -> dict[str, tuple[str, str]]:
    """Unit and meaning of every key in the table of SpectralMonitor's docstring."""
    text = inspect.getdoc(SpectralMonitor) or ""
    found = {}
    row = r"^``(spectral(?:_health)?/\w+(?:, _\w+)*)``\s{2,}(\S+)\s{2,}(.+)$"
    for names, unit, meaning in re.findall(row, text, re.MULTILINE):
        first, *others = names.split(", ")
        meaning = re.sub(r"^with ``\w+``: ", "", meaning.replace(" 0", " 0")).replace("``", "`")
        for name in (first, *(first.rpartition("_")[0] + other for other in others)):
            found[name] = (unit, meaning)
    return found


def meaning_of_layer(name: str) -> str:
    """What the docstrings of the records say of a quantity of one block."""
    described = getattr(LayerMeasurement, name, None)
    if isinstance(described, property):
        return first_sentence(described.__doc__ or "")
    for record in (LayerMeasurement, FunctionalMeasurement, WeightSignals):
        if name in {field.name for field in fields(record)}:
            entry = re.search(rf"^    {name}: (.+(?:\n        .+)*)", inspect.getdoc(record) or "", re.MULTILINE)
            if entry:
                return first_sentence(entry[1])
    raise ValueError(f"no record explains {name!r}")


def in_order(key: str) -> int:
    """The order of the quantities in the records."""
    records = (LayerMeasurement, FunctionalMeasurement, WeightSignals)
    names = ["ratio", *(field.name for record in records for field in fields(record))]
    return names.index(key.split("/")[1])


if __name__ == "__main__":
    for page, text in pages():
        page.write_text(text, encoding="utf-8")
