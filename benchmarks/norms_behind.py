"""What norms behind branches cost: Gemma 2 beside the same model without them (Llama), one thread.

    python benchmarks/norms_behind.py --width 1024 --layers 4

"anew" estimates the size of what enters each norm at every measurement; "carried" is what the package does. The weights
move by a thousandth of their size between measurements. Milliseconds, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import describe
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_spectral import find_blocks
from lightning_spectral.measuring import norm_sizes
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights


def build(kind: str, width: int, layers: int) -> nn.Module:
    """Return a model of this kind with random weights."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )


def times(kind: str, carried: bool, width: int, layers: int, rounds: int) -> tuple[float, float, list[float]]:
    """Return the milliseconds of the first measurement, of the later ones, and the last ratios."""
    model = build(kind, width, layers)
    meter = Meter(ModelWeights(model), find_blocks(model))
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(1 + rounds):
        if not carried:
            meter._sizes = [None] * len(meter._sizes)
        start = time.perf_counter()
        last = meter.measure()
        found.append(1e3 * (time.perf_counter() - start))
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1e-3 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
    return found[0], statistics.median(found[1:]), [layer.ratio or 0.0 for layer in last.layers]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(describe())
    print(
        f"\nwidth {given.width}, {given.layers} blocks; carried on while the deviation is below {norm_sizes._CARRIED}"
    )
    print(f"{'':>24}{'first':>10}{'later':>10}")
    rows = {"llama": ("llama", True), "gemma2, anew": ("gemma2", False), "gemma2, carried": ("gemma2", True)}
    ratios = {}
    for name, (kind, carried) in rows.items():
        first, later, ratios[name] = times(kind, carried, given.width, given.layers, given.rounds)
        print(f"{name:>24}{first:>7.0f} ms{later:>7.1f} ms", flush=True)
    pairs = zip(ratios["gemma2, anew"], ratios["gemma2, carried"], strict=True)
    print(f"largest difference of a ratio: {max(abs(b / a - 1) for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
