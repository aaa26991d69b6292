"""An audit of a checkpoint of 2 GB in shards: seconds, memory, and what of it is reading and multiplying.

    python benchmarks/audit_large.py
    python benchmarks/audit_large.py --gigabytes 0.5 --threads 1 --repeats 5

A folder with random bf16 weights of a Llama (width 2048) is written first and removed at the end. "cold" means that the
pages of its files were dropped before, "warm" that they lie in memory. The least that an audit can take is one reading
of the file and the products that the solver asks for: "reading" reads every byte once, "products" times the same number
of products of the same shapes with weights that are in memory already, in float32. "own memory" is what the process
needs beside the mapped files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from audit import own_memory
from machine import describe
from safetensors.torch import save_file
from torch import Tensor

WIDTH, INNER, VOCABULARY = 2048, 5632, 32_000


def weights(layer: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a layer by name."""
    head = f"model.layers.{layer}."
    narrow = (WIDTH // 4, WIDTH)
    shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": narrow, "v_proj": narrow, "o_proj": (WIDTH, WIDTH)}
    inner = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    named: dict[str, tuple[int, ...]] = {f"{head}self_attn.{name}.weight": shape for name, shape in shapes.items()}
    named |= {f"{head}mlp.{name}.weight": shape for name, shape in inner.items()}
    return named | {f"{head}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}


def write(folder: Path, size: float) -> int:
    """Write a model folder, eight layers a shard; return its bytes."""
    ends = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    ends |= {"model.norm.weight": (WIDTH,)}
    bytes_of = lambda shapes: 2 * sum(torch.Size(shape).numel() for shape in shapes.values())  # noqa: E731
    layers = max(2, round((size - bytes_of(ends)) / bytes_of(weights(0))))
    parts = [ends] + [
        {name: shape for layer in range(first, min(first + 8, layers)) for name, shape in weights(layer).items()}
        for first in range(0, layers, 8)
    ]
    generator, places = torch.Generator().manual_seed(0), {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        made = {name: torch.randn(shape, generator=generator) / WIDTH**0.5 for name, shape in part.items()}
        save_file({name: value.bfloat16() for name, value in made.items()}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    config |= {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 16, "num_key_value_heads": 4}))
    os.sync()
    return sum(file.stat().st_size for file in folder.iterdir())


def drop(folder: Path) -> None:
    """Drop the pages of the files from memory (Linux)."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_once(folder: Path) -> None:
    """Read every byte."""
    buffer = bytearray(2**22)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextmanager
def most_memory(answers: dict[str, float]) -> Iterator[None]:
    """Sample what the process needs for itself."""
    before, most, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    answers["own memory"] = (most - before) / 1e6


def counted(action: Callable[[], object]) -> Counter[tuple[bool, tuple[int, ...], int]]:
    """Return how often weights of which shape are multiplied with how many columns, and whether transposed."""
    from lightning_spectral.linalg import Matrix

    counts: Counter[tuple[bool, tuple[int, ...], int]] = Counter()
    plain = Matrix.matmat, Matrix.adjoint

    def noted(transposed: bool) -> Callable[[Any, Tensor], Tensor]:
        def multiply(self: Any, X: Tensor) -> Tensor:
            counts[transposed, tuple(self.shape), X.shape[1]] += 1
            return plain[transposed](self, X)

        return multiply

    Matrix.matmat, Matrix.adjoint = noted(False), noted(True)  # type: ignore[method-assign]
    try:
        action()
    finally:
        Matrix.matmat, Matrix.adjoint = plain  # type: ignore[method-assign]
    return counts


def products(counts: Counter[tuple[bool, tuple[int, ...], int]]) -> Callable[[], float]:
    """Return what times so many products with weights in float32 that are in memory: a few of each, times their number.

    The weights are made now, so that to make them is no part of it.
    """
    operands = {}
    for transposed, shape, columns in counts:
        rows = torch.randn(columns, shape[0] if transposed else shape[1])
        operands[transposed, shape, columns] = torch.randn(shape), rows

    def multiply(transposed: bool, weight: Tensor, rows: Tensor) -> float:
        return statistics.median(timed(lambda: rows @ weight if transposed else weight @ rows.mT) for _ in range(5))

    return lambda: sum(count * multiply(kind[0], *operands[kind]) for kind, count in counts.items())


def run(folder: Path, threads: int, repeats: int) -> dict[str, float]:
    """Measure everything in a fresh process; what is compared takes turns, as the machine may have other work."""
    torch.set_num_threads(threads)
    import transformers

    from lightning_spectral import audit
    from lightning_spectral.checkpoints import blockwise, two_at_a_time

    transformers.LlamaForCausalLM  # imported lazily, and no part of an audit  # noqa: B018

    def one_by_one(blocks: Any, _: Any, measure: Callable[[Any], Any]) -> Iterator[Any]:
        return map(measure, blocks)

    seen: dict[str, float] = {}
    counts = counted(lambda: audit(folder))
    with most_memory(seen):
        audit(folder)
    multiply = products(counts)
    rounds: defaultdict[str, list[float]] = defaultdict(list)
    for state, before in (("warm", read_once), ("cold", drop)):
        for _ in range(repeats):
            before(folder)
            rounds[f"reading, {state}"].append(timed(lambda: read_once(folder)))
            rounds[f"products, {state}"].append(multiply())
            for way, order in (("two at a time", two_at_a_time.two_at_a_time), ("one by one", one_by_one)):
                before(folder)
                blockwise.two_at_a_time = order  # type: ignore[attr-defined]
                rounds[f"{way}, {state}"].append(timed(lambda: audit(folder)))
                least = rounds[f"reading, {state}"][-1] + rounds[f"products, {state}"][-1]
                rounds[f"ratio {way}, {state}"].append(rounds[f"{way}, {state}"][-1] / least)
    seen |= {name: statistics.median(values) for name, values in rounds.items()}
    return seen | {"number of products": sum(counts.values())}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(describe())
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        print(f"{write(Path(name), args.gigabytes * 1e9) / 1e9:.2f} GB; medians of {args.repeats}, in seconds")
        for threads in args.threads:
            with ProcessPoolExecutor(1, context) as fresh:
                seen = fresh.submit(run, Path(name), threads, args.repeats).result()
            print(f"{threads} thread(s), {seen['number of products']:.0f} products")
            for state, way in itertools.product(("warm", "cold"), ("two at a time", "one by one")):
                print(
                    f"  {state}, {way:<13}  audit {seen[f'{way}, {state}']:6.2f}  reading "
                    f"{seen[f'reading, {state}']:5.2f}  products {seen[f'products, {state}']:5.2f}  "
                    f"audit / (reading + products) {seen[f'ratio {way}, {state}']:5.2f}"
                )
            print(f"  own memory {seen['own memory']:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
