"""What a measurement of Jacobians costs, in forward passes of the model of the example, beside its count on paper.

    python benchmarks/jacobian.py
    python benchmarks/jacobian.py --layers 12 --width 256 --batch-size 4

The unit is one forward pass over the same batch in the arithmetic that derivatives need: float64, attention by plain
products. On paper a measurement is one pass to record, then for each branch some evaluations of it, some products by
the transpose of its Jacobian J, which are backward passes to the stream that it reads, some products by J, which are
backward passes through those, and the arithmetic of the solver on its basis. What a pass of each kind costs is measured
on the model's own code, from its logits to its embeddings, weights aside.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch
from machine import describe
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral import find_blocks, measure
from lightning_spectral.linalg import Jacobian
from lightning_spectral.linalg.norms.krylov import BlockKrylov
from lightning_spectral.measuring.jacobians import update_ratios, watch_updates

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config, Windows, read_standard_library


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 176), ("heads", 8), ("context", 128), ("batch-size", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of a run, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def counted(run: Callable[[], object]) -> Counter[str]:
    """Run, and count evaluations of a branch, products by a Jacobian and by its transpose, and numbers multiplied."""
    counts: Counter[str] = Counter()

    def watch(owner: type, name: str, note: Callable[..., dict[str, int]]) -> AbstractContextManager[object]:
        original = getattr(owner, name)

        def noting(self: object, *args: object, **kwargs: object) -> object:
            counts.update(note(self, *args))
            return original(self, *args, **kwargs)

        return mock.patch.object(owner, name, noting)

    def orthogonalization(krylov: BlockKrylov) -> dict[str, int]:
        # Four products of the next block with the basis, two factorizations of the block, one copy of the basis.
        batch, k, n = krylov.basis.shape
        b = krylov._next.shape[1]
        return {"multiplications": batch * n * b * (4 * (k + b) + 2 * 4 * b)}

    with (
        watch(Jacobian, "__init__", lambda *_: {"evaluations": 1}),
        watch(Jacobian, "difference", lambda *_: {"evaluations": 2}),
        watch(Jacobian, "_by_source", lambda *_: {"products": 1, "transposed products": 2}),
        watch(Jacobian, "matmat", lambda _, X: {"products": X.shape[1]}),
        watch(Jacobian, "adjoint", lambda _, Y: {"transposed products": Y.shape[1]}),
        watch(BlockKrylov, "expand", orthogonalization),
    ):
        run()
    return counts


def passes(network: GPT, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return a forward pass, a backward pass from the logits to the embeddings, and one through the backward pass."""
    network.requires_grad_(False)
    ready: list[torch.Tensor] = []
    handle = network.tokens.register_forward_hook(lambda _, __, x: ready.append(x.requires_grad_()))
    with sdpa_kernel(SDPBackend.MATH):
        logits = network(ids)
    handle.remove()
    u = torch.randn_like(logits).requires_grad_()
    (gradient,) = torch.autograd.grad(logits, ready, u, create_graph=True)
    v, fixed = torch.randn_like(gradient), u.detach()

    def forward() -> None:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            network(ids)

    return {
        "evaluations": forward,
        "transposed products": lambda: torch.autograd.grad(logits, ready, fixed, retain_graph=True),
        "products": lambda: torch.autograd.grad(gradient, u, v, retain_graph=True),
    }


def main() -> None:
    """Print the cost measured and on paper."""
    args = parse()
    print(describe())
    torch.manual_seed(0)
    model = GPT(Config(args.layers, args.width, args.heads, args.context))
    windows = Windows(read_standard_library()[0], args.context).windows
    ids = windows[torch.arange(args.batch_size)].long()[:, :-1]
    blocks = find_blocks(model, batch=ids)
    print(f"GPT of {args.layers} blocks, width {args.width}, on {tuple(ids.shape)} tokens\n")

    def plainly() -> None:
        with torch.no_grad():
            model(ids)

    def measuring() -> object:
        return measure(model, blocks, linearization="jacobian", batch=ids)

    counts = counted(measuring)
    kinds = passes(copy.deepcopy(model).double(), ids)
    runs = {**kinds, "plain": plainly, "measurement": measuring}
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(args.repeats):  # side by side, so that whatever else the machine does meets all of them alike
        for kind, run in runs.items():
            times[kind].append(seconds(run, 1 if kind == "measurement" else 10))
    took = {kind: statistics.median(values) for kind, values in times.items()}
    unit, branches = took["evaluations"], 2 * args.layers
    tokens, width = ids.numel(), args.width
    multiplications = tokens * (args.layers * (12 * width**2 + 2 * ids.shape[1] * width) + 256 * width)
    # Branches come in equal numbers, and a pass through one of them is half a block on average.
    paper = 1 + sum(counts[kind] * took[kind] / unit for kind in kinds) / branches
    paper += counts["multiplications"] / multiplications

    print(f"forward pass: {took['plain'] * 1e3:.1f} ms in float32, {unit * 1e3:.1f} ms in float64 by plain products")
    for kind in kinds:
        print(f"{kind:>20}: {counts[kind] / branches:5.1f} per branch, {took[kind] / unit:.2f} forward passes each")
    print(f"{'solver':>20}: {counts['multiplications'] / multiplications:5.1f} forward passes in all")
    measured = took["measurement"] / unit
    print(f"a measurement of {branches} branches: {took['measurement']:.2f} s")
    print(f"  measured {measured:>7.1f} forward passes")
    print(f"  on paper {paper:>7.1f} forward passes; measured / paper = {measured / paper:.2f}")

    update = seconds(lambda: update_ratios(model, blocks, (ids,), {}), args.repeats)
    watch = watch_updates(model, blocks, (ids,), {})

    def watched() -> None:
        with watch:
            plainly()

    hooks = f"{(seconds(watched, 20) - seconds(plainly, 20)) * 1e3:.1f} ms from hooks"
    print(f"\nupdate ratios alone: {update * 1e3:.0f} ms with a traced pass, {hooks}")


if __name__ == "__main__":
    main()
