"""What an audit costs: time beside reading the file once, and memory beside the size of one block.

    python benchmarks/audit.py
    python benchmarks/audit.py --layers 4 8 16 --width 2048

A folder with random bf16 weights of a Llama is written first. The audit then runs in a fresh process, as the command
line does; memory that belongs to the process alone (not to the file, which is mapped) is sampled meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from machine import describe
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def write(folder: Path, layers: int, width: int) -> tuple[int, int]:
    """Write a model folder; return its bytes and those of one block."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        vocab_size=32_000,
        architectures=["LlamaForCausalLM"],
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: (torch.randn(shape, generator=generator) / width**0.5).bfloat16()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
    )
    block = 2 * sum(shape.numel() for name, shape in shapes.items() if ".layers.0." in name)
    return (folder / "model.safetensors").stat().st_size, block


def own_memory() -> int:
    """Bytes of this process that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def run(folder: Path, answers: multiprocessing.Queue[dict[str, float]]) -> None:
    """Read the file once, audit it, and say what both took."""
    from lightning_spectral import audit

    start = time.perf_counter()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name).view(torch.int16).max()
    reading = time.perf_counter() - start
    import transformers

    transformers.LlamaForCausalLM  # imported lazily, and no part of an audit  # noqa: B018
    before, most, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    marks = [time.perf_counter()]
    audit(folder, progress=lambda _, __: marks.append(time.perf_counter()))
    done.set()
    thread.join()
    answers.put(
        {
            "reading": reading,
            "each further block": (marks[-1] - marks[1]) / max(1, len(marks) - 2),
            "audit": marks[-1] - marks[0],
            "memory": most - before,
        }
    )


def main() -> None:
    """Print one line per depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=1024)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(describe())
    heads = ("layers", "file MB", "block MB", "read s", "audit s", "s / block", "own memory MB")
    print(" ".join(f"{head:>8}" for head in heads))
    context = multiprocessing.get_context("spawn")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as name:
            size, block = write(Path(name), layers, args.width)
            answers = context.Queue()
            process = context.Process(target=run, args=(Path(name), answers))
            process.start()
            seen = answers.get(timeout=600)
            process.join()
        values = (size / 1e6, block / 1e6, seen["reading"], seen["audit"], seen["each further block"])
        print(f"{layers:>8}", *(f"{value:>8.3g}" for value in values), f"{seen['memory'] / 1e6:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
