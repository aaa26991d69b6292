"""The surveyed architectures of ``tests/data/architectures.json``, read into expected blocks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from .example import ExpectedBlock, Sites, join

DATA = Path(__file__).parents[2] / "data" / "architectures.json"
Entry = dict[str, Any]


@functools.cache
def entries() -> dict[str, Entry]:
    """Every surveyed architecture, by name."""
    return {entry["name"]: entry for entry in json.loads(DATA.read_text(encoding="utf-8"))}


def expected_blocks(entry: Entry) -> tuple[ExpectedBlock, ...]:
    """The blocks of an entry, stack by stack and in order within each stack."""
    stacks = list(dict.fromkeys(pattern["list"] for pattern in entry["blocks"]))
    numbered = [(stacks.index(pattern["list"]), i, pattern) for pattern in entry["blocks"] for i in pattern["indices"]]
    return tuple(_block(entry, pattern, index) for _, index, pattern in sorted(numbered, key=lambda item: item[:2]))


def _block(entry: Entry, pattern: Entry, index: int) -> ExpectedBlock:
    name = f"{pattern['list']}.{index}"
    others = tuple(_sites(pattern, name, site) for site in pattern["other"])
    return ExpectedBlock(
        name=name,
        attention=_sites(pattern, name, pattern["attention"]),
        mlp=None if pattern["mlp"] is None else _sites(pattern, name, pattern["mlp"]),
        other=others,
        kinds=tuple(pattern["attention_kinds"]),
        mlp_kinds=("mlp", "mixer") if "3-D parameters" in pattern["mlp_flags"] else ("mlp",),
        other_kinds=tuple("mlp" if "per_layer_input" in site else "cross_attention" for site in pattern["other"]),
        calls=_calls(pattern),
        verified=entry["residual_add"] != "affine (h+b)*s",
    )


def _sites(pattern: Entry, block: str, site: str) -> Sites:
    """The listed site, then the modules that carry the very same value as often."""
    sites = [site]
    for group in pattern["added"]:
        how = {name.split("[")[0]: value for name, value in group.items()}
        if site in how:
            sites += [name for name, value in how.items() if value == how[site]]
    return tuple(dict.fromkeys(join(block, name) for name in sites))


def _calls(pattern: Entry) -> int:
    """How often the block runs: what the listed attention site says."""
    for group in pattern["added"]:
        for name, value in group.items():
            if name.split("[")[0] == pattern["attention"]:
                return int(value.split(", ")[1])
    return 1
