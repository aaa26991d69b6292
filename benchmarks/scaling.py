"""What one measurement costs at scale: formulas for the bytes, the operations and the messages, and their tables.

    python benchmarks/scaling.py                                 # the tables of docs/scaling.md
    python benchmarks/scaling.py --iterations 512 1024 2048      # how the one number grows that no formula gives

The tables are arithmetic, not measurements. ``tests/distributed/test_scaling.py`` holds the formulas against what real
runs read, compute and send. The linearization is ``"circuit"``, the solver :class:`RandomizedSVD` as it is by default,
and every branch two matrices and the gain of a norm, as in GPT and Llama.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from lightning_spectral.linalg import Matrix, Product, RandomizedSVD

Start = Literal["cold", "warm", "again"]  # again: a warm start whose bound has to be certified anew

KEPT, RANDOM = RandomizedSVD().n_components, RandomizedSVD().n_oversamples  # columns of the block [V X]
BATCH = 8  # operators whose products, and whose messages, go together
WORD = 4  # bytes of a number in a float32 weight or vector


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, as far as a measurement sees it.

    Attributes:
        layers: Blocks L.
        width: Channels d of the residual stream; also the number of query channels.
        hidden: Channels f of the MLP.
        values: Rows v of W_v: key/value heads times channels of a head.
        parameters: Of the whole model. Queries, keys, gates and embeddings are not measured.
    """

    layers: int
    width: int
    hidden: int
    values: int
    parameters: float = 0.0


class Operator(NamedTuple):
    """A branch W_out · W_in · diag(γ).

    Attributes:
        width: Channels d of the residual stream.
        weights: Entries N of both matrices.
        forward: Rows of the blocks that a product adds up, one behind each matrix.
        adjoint: Rows of the blocks that the transposed product adds up.
    """

    width: int
    weights: int
    forward: int
    adjoint: int


class Flops(NamedTuple):
    """Operations of one operator, where a multiplication and an addition are two.

    Attributes:
        products: With the weights, which processes that hold shards divide among themselves.
        projections: Onto the Krylov basis, in every process.
        factorizations: Of blocks of vectors, in every process: two triangular solves of dc² for a block of c columns.
    """

    products: float
    projections: float
    factorizations: float


class Messages(NamedTuple):
    """What one process contributes to a measurement of sharded weights.

    Attributes:
        summed: Bytes of the blocks of vectors that are added up.
        agreed: Bytes of the norm gains and numbers that all take from the first process, also by sums.
        gathered: Bytes of the norm gains where they are cut, also by sums: a process has zeros for what others hold.
        sums: Number of all-reduces, at most: in how many steps the bounds are looked at is adaptive.
    """

    summed: float
    agreed: float
    gathered: float
    sums: int


def operators(shape: Shape, stays: Collection[str] = ()) -> list[Operator]:
    """Return the operators of a model in the order in which they are solved: attention and MLP, block by block.

    Args:
        shape: The model.
        stays: The branches, ``"attention"`` and ``"mlp"``, of whose blocks only those behind the second matrix are
            added up, because tensor parallelism leaves the first ones where they are read.
    """
    d, f, v = shape.width, shape.hidden, shape.values
    own = {"attention": (v, d), "mlp": (f, f)} | dict.fromkeys(stays, (0, 0))
    (forward, adjoint), (up, down) = own["attention"], own["mlp"]
    attention = Operator(d, d * v + d * d, forward=forward + d, adjoint=adjoint + d)  # heads are repeated behind W_v
    mlp = Operator(d, 2 * d * f, forward=up + d, adjoint=down + d)
    return [attention, mlp] * shape.layers


def columns(start: Start) -> tuple[int, int]:
    """Return the columns of the first product, and of all others."""
    return KEPT + RANDOM, KEPT if start == "warm" else KEPT + RANDOM


def padded(columns: int) -> int:
    """Return the columns that a product by A takes on a CPU, where 14 take longer than 16."""
    return 16 if 8 < columns < 16 else columns


def bytes_read(operator: Operator, start: Start, iterations: int, word: int = WORD) -> float:
    """Return the bytes of weights that are read: t iterations are t products and t transposed products.

    Where a warm start is certified again, the first transposed product is taken in two parts, of V and of X.
    """
    return (2 * iterations + (start == "again")) * operator.weights * word


def flops(operator: Operator, start: Start, iterations: int) -> Flops:
    """Return the operations of all products, projections and factorizations of one operator."""
    (first, k), t, d = columns(start), iterations, operator.width
    products = 2 * operator.weights * (padded(first) + padded(k) * (t - 1) + k * t)
    # Step i projects k columns onto i·k, twice, and takes the projection out, twice; it projects noise once. Two Gram
    # matrices make the rest orthonormal. In the end the basis is combined.
    projections = k**2 * d * t * (5 * t + 9) + 2 * KEPT * k * d * (t + 1) + 4 * KEPT**2 * d
    factorizations = 2 * k**2 * d * t + 2 * KEPT**2 * d
    if start != "cold":
        projections += 2 * (KEPT**2 + RANDOM**2) * d  # Grams that bound the change of the operator
    if start == "again":  # V has been iterated once by then, and [V X] is made orthonormal
        projections += 14 * KEPT**2 * d + 4 * k**2 * d
        factorizations += 2 * KEPT**2 * d + 2 * k**2 * d
    if start != "warm":
        factorizations += k**2 * d  # the products of the start made to fit
    return Flops(products, projections, factorizations)


def summed(operator: Operator, start: Start, iterations: int) -> float:
    """Return the bytes of the blocks that one process contributes to sums over the processes."""
    first, k = columns(start)
    rows = operator.forward * (first + k * (iterations - 1)) + operator.adjoint * k * iterations
    return WORD * rows


def block_sums(start: Start, iterations: Sequence[int], stays: Collection[str] = ()) -> int:
    """Return how often the operators of a batch add up blocks together.

    Every product by a matrix ends in a sum: two for each product by A and for each by Aᵀ. An operator whose first
    blocks stay where they are takes half as many, and waits for the others while they run.

    Args:
        start: Of all operators.
        iterations: One number per operator, of attention and MLP in turn.
        stays: See :func:`operators`.
    """
    half, whole = 0, 0
    for name, t in zip(("attention", "mlp") * len(iterations), iterations, strict=False):
        half, whole = (max(half, t), whole) if name in stays else (half, max(whole, t))
    return 4 * whole + 2 * max(0, half - whole) + (2 if whole else 1) * (start == "again")


def messages(shape: Shape, start: Start, iterations: Sequence[int], stays: Collection[str] = ()) -> Messages:
    """Return what one process contributes: every sum of blocks is one all-reduce, whatever the weights are cut along.

    Args:
        shape: The model.
        start: Of all operators.
        iterations: One number per operator.
        stays: See :func:`operators`.
    """
    items = operators(shape, stays)
    batches = [iterations[i : i + BATCH] for i in range(0, len(items), BATCH)]
    # The range with, if warm, the carried bounds; then the errors, after the first step or, if certified, the second.
    known, skipped = (8 if start == "cold" else 24), (0 if start == "warm" else 1)
    looks = sum(t - skipped for t in iterations)
    gains = WORD * shape.width
    return Messages(
        summed=sum(summed(item, start, t) for item, t in zip(items, iterations, strict=True)),
        # Per operator: its gain, its range, its carried bound and value, four numbers a look, its norm and bound.
        agreed=len(items) * (gains + known + 16) + 32 * looks,
        gathered=len(items) * gains,
        # The gains of all operators: gathered, and taken from the first process; their norms.
        sums=sum(block_sums(start, batch, stays) + 1 + max(batch) - skipped for batch in batches) + 3,
    )


def vector_length(layers: int, ranks: int) -> int:
    """Return the float64 numbers that each process contributes to the one all-gather of a measurement."""
    seconds, own, of_batch, largest, scales = 1, 12 * math.ceil(layers / ranks), 8 * layers, 4 * layers, 2 * layers
    output = 6
    return seconds + own + of_batch + output + largest + scales


# The tables.

# Llama 7B: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), Table 2, and the MLP's 11008
# from its released configuration. 70B and 405B: "The Llama 3 Herd of Models" (2024), Table 3.
MODELS = {
    "7B": Shape(32, 4096, 11008, 32 * 128, 6.7e9),
    "70B": Shape(80, 8192, 28672, 8 * 128, 70.6e9),
    "405B": Shape(126, 16384, 53248, 8 * 128, 405.9e9),
}
RANKS = (8, 64, 512)
# Iterations. Cold: random weights of width 8192 took 9, one more for each doubling. Warm: the most that there are.
STARTS: dict[Start, int] = {"cold": 10, "warm": 3}

# Assumed, of one process of many: an accelerator as in large runs of 2024, with little of what its makers promise.
TRAINING, FLOAT32 = 400e12, 30e12  # operations per second: of a training step in 16 bits, of products in float32
MEMORY, NETWORK, LATENCY = 2e12, 25e9, 50e-6  # bytes per second, bytes per second, seconds per collective
TOKENS = 4096  # per process and step
EVERY = 50  # steps


class Cost(NamedTuple):
    """One measurement, seen from one process.

    Attributes:
        read: Bytes of weights.
        flops: Operations.
        contributed: Bytes given to collectives.
        collectives: Their number.
        sent: Bytes that leave the process if sums and gathers go round a ring.
    """

    read: float
    flops: float
    contributed: float
    collectives: int
    sent: float

    @property
    def seconds(self) -> float:
        """Nothing overlaps; launches, waiting for others and what the CPU does are left out."""
        return self.read / MEMORY + self.flops / FLOAT32 + self.sent / NETWORK + self.collectives * LATENCY


def replicated_cost(shape: Shape, ranks: int, start: Start) -> Cost:
    """Return the cost where every process has all weights, of a process with the most blocks."""
    items = operators(shape)[: 2 * math.ceil(shape.layers / ranks)]
    t = STARTS[start]
    vector, decision = 8 * vector_length(shape.layers, ranks), 8
    return Cost(
        read=sum(bytes_read(item, start, t) for item in items),
        flops=sum(sum(flops(item, start, t)) for item in items),
        contributed=vector + 3 * decision,
        collectives=4,  # one gather; each of three decisions adds up an integer
        sent=(ranks - 1) * vector + 3 * 2 * decision * (ranks - 1) / ranks,
    )


def sharded_cost(shape: Shape, ranks: int, start: Start) -> Cost:
    """Return the cost where every weight is cut into as many parts as there are processes."""
    t, items = STARTS[start], operators(shape)
    each = [flops(item, start, t) for item in items]
    m, after = messages(shape, start, [t] * len(items)), replicated_cost(shape, ranks, start)
    around = 2 * (m.summed + m.agreed + m.gathered) * (ranks - 1) / ranks
    return Cost(
        read=sum(bytes_read(item, start, t) for item in items) / ranks,
        flops=sum(item.products / ranks + item.projections + item.factorizations for item in each),
        contributed=m.summed + m.agreed + m.gathered + after.contributed,
        collectives=m.sums + after.collectives,
        sent=around + after.sent,
    )


def step_seconds(shape: Shape) -> float:
    """Return the assumed time of a training step: 6 operations per parameter and token, all messages hidden."""
    return 6 * shape.parameters * TOKENS / TRAINING


def step_bytes(shape: Shape, ranks: int, weights: str) -> float:
    """Return the bytes that a process sends per training step, in 16 bits and round a ring.

    Whole weights: the sum of the gradients. Cut ones: two gathers of the weights, one scatter of the gradients.
    """
    return (2 if weights == "whole" else 3) * 2 * shape.parameters * (ranks - 1) / ranks


def amount(number: float, unit: str = "") -> str:
    """Return three digits and a prefix."""
    power = min(max(int(math.log10(number)) // 3, 0), 5)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"


def print_costs() -> None:
    """Print one line per model, layout, number of processes and start."""
    print("                             weights                          collec-      of a step's     every")
    print("model  weights  ranks  start     read    FLOP  contributed    tives   traffic     time  50 steps")
    cases = [("7B", "whole"), *((model, "cut") for model in MODELS)]
    for (model, weights), ranks in itertools.product(cases, RANKS):
        for start in STARTS:
            shape = MODELS[model]
            cost = (replicated_cost if weights == "whole" else sharded_cost)(shape, ranks, start)
            traffic, time = cost.sent / step_bytes(shape, ranks, weights), cost.seconds / step_seconds(shape)
            often = f"{time / EVERY:.2%}" if start == "warm" else "once"
            read, operations, given = amount(cost.read, "B"), amount(cost.flops), amount(cost.contributed, "B")
            print(
                f"{model:>5}  {weights:>7}  {ranks:>5}   {start}  {read:>7}  {operations:>6}  {given:>11}  "
                f"{cost.collectives:>7}  {traffic:>8.3%}  {time:>7.2%}  {often:>7}"
            )


def print_iterations(widths: Sequence[int]) -> None:
    """Print how many iterations random weights take, the hardest ones, cold and after a step of an optimizer."""
    print("width  branch     cold  bound   warm  bound")
    for d in widths:
        generator = torch.Generator().manual_seed(d)
        for name, inner in (("attention", d), ("MLP", 4 * d)):
            shapes = ((d, inner), (inner, d))
            weights = [torch.randn(shape, generator=generator).div_(shape[1] ** 0.5) for shape in shapes]
            items = [Product(*map(Matrix, weights))]
            solver = RandomizedSVD()
            (cold,), state = solver.compute(items, solver.init(items))
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=1e-3 * float(weight.std()))
            (warm,), _ = solver.compute(items, state)
            seen = "  ".join(f"{norm.iterations:>5}  {norm.error_bound:>5.2f}" for norm in (cold, warm))
            print(f"{d:>5}  {name:<9}{seen}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs="*", metavar="WIDTH", help="only count iterations")
    args = parser.parse_args()
    if args.iterations is None:
        print_costs()
    else:
        print_iterations(args.iterations or [512, 1024, 2048])


if __name__ == "__main__":
    main()
