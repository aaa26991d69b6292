"""What finding the blocks costs: beside a plain forward pass, and for models that no machine here could run.

    python benchmarks/discovery.py
    python benchmarks/discovery.py --threads 1 --width 512
    python benchmarks/discovery.py --large      # the third table alone

The first table has the example's GPT at several depths; forward passes and discoveries alternate. The second table has
one block whose experts are modules of a list and are run one after the other. The third table has models of true
sizes. Their weights are on the meta device, but those of the last one, which are real. Each runs in a process of its
own, because the peak of memory is that of a process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe
from memory import MEBI, RESET, resident
from torch import nn

from lightning_spectral import find_blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config

_LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
}
# The class of the configuration, its settings beside the published ones, and the device of the weights.
LARGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama 3 70B": ("LlamaConfig", _LLAMA_70B, "meta"),
    "DeepSeek-V3": ("DeepseekV3Config", {}, "meta"),
    "GPT-OSS 120B": ("GptOssConfig", {}, "meta"),
    "Llama 16 × 2048": ("LlamaConfig", _LLAMA_1B, "cpu"),
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48, 96])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="fewer than the cores, where other work shares them")
    parser.add_argument("--large", action="store_true", help="the third table alone")
    parser.add_argument("--case", choices=LARGE, help="one row of the third table alone")
    return parser.parse_args()


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def beside_a_pass(args: argparse.Namespace) -> None:
    """Print one row per depth, medians over the repeats."""
    print(f"GPT of width {args.width}\n")
    print(f"{'blocks':>6}   {'forward pass':>12}   {'find_blocks':>11}   {'beyond it':>9}   {'verified':>8}")
    for depth in args.depths:
        model = GPT(Config(depth, args.width, 8, 128)).eval()
        ids = torch.randint(0, 256, (2, 13))
        model(ids)
        run, find = partial(model, ids), partial(find_blocks, model, batch=ids)
        pairs = [(seconds(run), seconds(find)) for _ in range(args.repeats)]
        forward, found = (statistics.median(column) for column in zip(*pairs, strict=True))
        verified = sum(block.verified for block in find_blocks(model, batch=ids))
        print(f"{depth:>6}   {forward:>10.3f} s   {found:>9.3f} s   {found - forward:>7.3f} s   {verified:>8}")


class Experts(nn.Module):
    """A mixture: each token is sent to 2 experts of a list."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add up what the experts make of their tokens."""
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        total = torch.zeros_like(flat)
        for place, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == place)
            total.index_add_(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        return total.view_as(x)


def experts_in_a_list(args: argparse.Namespace) -> None:
    """Print one row per number of experts, medians over the repeats."""
    print(f"\n{'experts':>7}   {'find_blocks':>11}   {'verified':>8}")
    for count in args.experts:
        layer = nn.TransformerEncoderLayer(64, 4, batch_first=True, norm_first=True).eval()
        layer.linear1, layer.linear2, layer.activation = Experts(count, 64), nn.Identity(), nn.Identity()
        find = partial(find_blocks, nn.Sequential(layer), batch=torch.randn(4, 128, 64))
        found = statistics.median(seconds(find) for _ in range(args.repeats))
        print(f"{count:>7}   {found:>9.2f} s   {sum(block.verified for block in find()):>8}")


def large_case(name: str) -> None:
    """Print one row of the third table: of one search, the first of the process."""
    import transformers  # takes seconds

    warnings.simplefilter("ignore")
    kind, settings, device = LARGE[name]
    config = getattr(transformers, kind)(**settings)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 1000, (2, 13), device="cpu")
    find_blocks(GPT(Config(1, 64)), batch=ids % 256)  # what torch loads on the first search of any size is not counted
    RESET.write_text("5")
    before, start, busy = resident("VmRSS"), time.perf_counter(), time.process_time()
    blocks = find_blocks(model, batch=ids)
    wall, busy = time.perf_counter() - start, time.process_time() - busy
    extra = (resident("VmHWM") - before) / MEBI
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    verified = sum(block.verified for block in blocks)
    print(
        f"{name:<15}   {weights:>5.1f} · 10⁹   {device:>6}   {len(blocks):>6}   {verified:>8}   {wall:>9.2f} s   "
        f"{busy:>9.2f} s   {extra:>5.0f} MiB"
    )


def main() -> None:
    """Print the tables."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.case:
        large_case(args.case)
        return
    print(describe())
    if not args.large:
        beside_a_pass(args)
        experts_in_a_list(args)
    if not RESET.exists():
        raise SystemExit("the peak of memory is read from /proc, which this machine does not have")
    print(
        f"\n{'model':<15}   {'weights':>11}   {'device':>6}   {'blocks':>6}   {'verified':>8}   {'find_blocks':>11}   "
        f"{'processor':>11}   {'extra':>9}"
    )
    for name in LARGE:
        command = [sys.executable, __file__, "--case", name]
        command += ["--threads", str(args.threads)] if args.threads else []
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()
