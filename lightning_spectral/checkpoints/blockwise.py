"""``audit``: from a checkpoint file to a :class:`Measurement`, one block at a time."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_spectral import _checks
from lightning_spectral.checkpoints.architecture import from_config
from lightning_spectral.checkpoints.files import Checkpoint, open_checkpoint
from lightning_spectral.checkpoints.source import Source, find_source, refuse_differences
from lightning_spectral.checkpoints.two_at_a_time import two_at_a_time, weights_of
from lightning_spectral.checkpoints.unread import refuse_unread_adapters, unread
from lightning_spectral.checkpoints.untrusted import damage, printable, read_json
from lightning_spectral.discovery.asked import check_blocks
from lightning_spectral.errors import CheckpointError, SpectralError
from lightning_spectral.linalg.solvers import SolverChoice
from lightning_spectral.measuring.linearize import WeightLinearization
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import LayerMeasurement, Measurement, ResidualBlock
from lightning_spectral.records.plain import from_plain
from lightning_spectral.weights.names import parameters_of, scale_keys, site_of, unwrapped

__all__ = ["audit"]

_CONFIG = "config.json"


def audit(
    path: str | Path,
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    linearization: WeightLinearization = "circuit",
    config: str | Path | None = None,
    key: str | None = None,
    solver: SolverChoice = None,
    safe_zone: tuple[float, float] = (0.5, 2.0),
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure every residual block of a checkpoint file. No model is loaded, and nothing in the file is executed.

    The numbers are those of :func:`~lightning_spectral.measure` on the loaded model. Weights are mapped and read block
    by block, two at a time: no more than those are in memory (but all of a file that ``torch.save`` wrote in its format
    before 1.6).

    Where the branches are is not written in the weights. It is known from ``blocks``; else from what
    :class:`SpectralMonitor` has left in the checkpoints of a run that it watched; else from a ``config.json`` whose
    ``model_type`` the installed transformers knows.

    Args:
        path: A ``.safetensors`` file, a Hugging Face folder (sharded or not: what transformers would load of it), a
            Lightning checkpoint (a file, or the folder that several processes wrote), a file of ``torch.save`` with a
            state dict in it, or a GGUF file.
        blocks: The blocks of the model, ``find_blocks(model)``, for an architecture of your own. They are names,
            layouts and shapes, so those of a freshly built model of the same size do.
        linearization: ``"circuit"`` or ``"paper"``, as in :func:`~lightning_spectral.measure`.
        config: A ``config.json``, or a folder with one; by default, the one beside the weights.
        key: Which weights are meant where a file has those of several models: what their names begin with, such as
            ``"ema"``, ``"state_dict.teacher"`` or the name of a module.
        solver: How spectral norms are computed: :class:`RandomizedSVD` by default, or :class:`ExactSVD`.
        safe_zone: The interval of ratios that counts as balanced.
        progress: Called after each block with the number of blocks done and of all blocks.

    Returns:
        The measurement; ``print`` shows it as a table. Its ``notes`` say which layers of the file no block has, and
        from what weights were dequantized.

    Raises:
        CheckpointError: The file cannot be read, it is not clear which weights are meant, their structure is not known,
            or there is no number to measure.
        ConfigurationError: The linearization is unknown, or ``blocks`` are none.

    Example:
        >>> torch.save(model.state_dict(), "weights.pt")
        >>> [layer.name for layer in audit("weights.pt", find_blocks(model))]
        ['transformer.h.0', 'transformer.h.1', 'transformer.h.2']
    """
    start = time.perf_counter()
    check_blocks(blocks, "audit(path, find_blocks(model))")
    zone = _checks.interval("safe_zone", safe_zone)
    checkpoint = open_checkpoint(path, key)
    found, source = _structure(checkpoint, blocks, config)
    _refuse_unplaced_scales(checkpoint, found, source)
    refuse_unread_adapters(checkpoint, source, found)
    notes = (*checkpoint.notes, *unread(checkpoint, source, found), *_unverified(found))

    def measure(block: ResidualBlock) -> LayerMeasurement:
        with _fitting(path, block):
            weights = weights_of(block, source)
            meter = Meter(weights, (block,), linearization=linearization, solver=solver, among=found)
            return meter.measure().layers[0]

    layers: list[LayerMeasurement] = []
    for layer in two_at_a_time(found, source, measure):
        layers.append(layer)
        if progress is not None:
            progress(len(layers), len(found))
    _refuse_empty(checkpoint, layers)
    seconds = time.perf_counter() - start
    return Measurement(checkpoint.step, linearization, tuple(layers), zone, seconds, notes=notes)


@contextmanager
def _fitting(path: str | Path, block: ResidualBlock) -> Iterator[None]:
    """Say which block has weights that its layouts do not fit; layouts may come from the file, and do anything."""
    try:
        yield
    except SpectralError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{printable(path)}: the weights of {printable(block.name)} do not fit together: {printable(error)}"
        ) from None


def _structure(
    checkpoint: Checkpoint, blocks: Sequence[ResidualBlock] | None, config: str | Path | None
) -> tuple[tuple[ResidualBlock, ...], Source]:
    file = checkpoint.folder / _CONFIG if config is None else Path(config)
    file = file / _CONFIG if file.is_dir() else file
    if blocks is None and config is None and checkpoint.blocks is not None:
        with damage(checkpoint.path, "the blocks that a monitor has left in a checkpoint"):
            blocks = from_plain(checkpoint.blocks)
    if blocks is not None:
        blocks = unwrapped(blocks)
        needed = parameters_of(blocks)
        source = find_source(checkpoint, needed)
        # Where a shape is not known, the factors of a branch fit together or are refused when they are multiplied.
        refuse_differences(checkpoint, source, needed)
        return blocks, source
    if config is None and checkpoint.config is not None:
        return from_config(checkpoint, dict(checkpoint.config), checkpoint.path)
    if config is None and not file.exists():
        raise CheckpointError(
            f"{printable(checkpoint.path)}: found {len(checkpoint.shapes)} tensors ({_outline(checkpoint)}), but "
            "nothing says where norms stand, how heads lie in a matrix and what multiplies a branch: expected a "
            f"{_CONFIG} beside it, or what SpectralMonitor leaves in the checkpoints of a run. Name a config (config=, "
            "--config), or pass the blocks of a model of your own: audit(path, find_blocks(model))"
        )
    return from_config(checkpoint, read_json(file), file)


def _unverified(blocks: Sequence[ResidualBlock]) -> Iterator[str]:
    """Yield a sentence on the blocks whose structure is in doubt: nobody who reads a table has seen the blocks."""
    doubtful = [block for block in blocks if not block.verified and block.evidence != "hints"]
    if doubtful:
        first = doubtful[0]
        yield (
            f"the self-check failed on {len(doubtful)} of {len(blocks)} blocks, whose numbers may not be those of "
            f"their branches: {printable(first.name, 60)} ({printable(first.evidence, 200)})"
        )


def _outline(checkpoint: Checkpoint) -> str:
    """Return the matrices that occur most often, with a star for the numbers in their names."""
    counts = Counter(re.sub(r"\d+", "*", name) for name, shape in checkpoint.shapes.items() if len(shape) > 1)
    shown = ", ".join(f"{count} x {printable(name, 60)}" for name, count in counts.most_common(4))
    return shown + (", ..." if len(counts) > 4 else "")


def _refuse_unplaced_scales(checkpoint: Checkpoint, blocks: Sequence[ResidualBlock], source: Source) -> None:
    """Refuse residual scales that belong to no branch: the model computes with them, and the audit would not."""
    branches = [branch for block in blocks for branch in block.branches]
    sites = {site for branch in branches for site in (branch.site, *branch.aliases)}
    sites |= {f"param:{name}" for name in parameters_of(blocks)}
    for name in scale_keys(source.readers):
        if site_of(name) not in sites:
            raise CheckpointError(
                f"{printable(checkpoint.path)}: the residual scale {printable(name)} belongs to none of the branches"
            )


def _refuse_empty(checkpoint: Checkpoint, layers: Sequence[LayerMeasurement]) -> None:
    if all(layer.mlp_norm is None and layer.attention_norm is None for layer in layers):
        reasons = "; ".join(dict.fromkeys(printable(layer.reason) for layer in layers if layer.reason)) or "no branches"
        raise CheckpointError(
            f"{printable(checkpoint.path)}: none of its {len(layers)} blocks has a norm: {printable(reasons, 300)}"
        )
