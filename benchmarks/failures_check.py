"""Do the sick trainings of `failures` fail, and do their healthy twins learn? Measured without this package.

    python benchmarks/failures_check.py
    python benchmarks/failures_check.py post_norm_lm no_norms --seeds 0 2

A line is one run. Loss: the first, and the mean of the last 20 steps. On the held-out batch, in evaluation mode: the
token residual of the last layer's output, the spread of the model's output over the samples (the deviation from their
mean, relative to the output), and the largest attention logit of the register's own blocks. "failed" is what `verdict`
says; what counts is whether it has the case's label. A healthy classifier's tokens may agree.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

import torch
from failures import CASES, Case, Training
from failures.parts import Attention, Block
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

LAYERS = (Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, BertLayer, GPT2Block)
EQUAL, LARGE_LOGIT, OF_CHANCE = 0.05, 100.0, 0.95


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    first: float
    last: float
    finite: bool
    moved: bool
    residual: float
    spread: float
    logit: float
    seconds: float


def train(training: Training) -> list[float]:
    """Train to the end, and return the loss of each step."""
    losses = []
    for step in range(training.steps):
        training.schedule(step)
        loss = training.loss(training.batch(step))
        training.optimizer.zero_grad()
        loss.backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_(training.model.parameters(), training.clip)
        training.optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def judge(training: Training) -> tuple[float, float, float]:
    """Return the token residual, the spread over samples and the largest attention logit, all on the held-out batch."""
    model, seen, logits = training.model.eval(), dict[str, Tensor](), [math.nan]
    last = [module for module in model.modules() if isinstance(module, LAYERS)][-1]

    def note_tokens(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["tokens"] = output if isinstance(output, Tensor) else output[0]

    def note_logits(module: nn.Module, inputs: Any, output: Any) -> None:
        logits.append(module.logits(inputs[0]).abs().amax().item())

    hooks = [last.register_forward_hook(note_tokens)]
    hooks += [part.register_forward_hook(note_logits) for part in model.modules() if isinstance(part, Attention)]
    outputs = model(*training.inputs(training.held_out)).flatten(1)
    for hook in hooks:
        hook.remove()
    largest = max(logits[1:], default=math.nan)
    return deviation(seen["tokens"], 1), deviation(outputs, 0), largest


def deviation(x: Tensor, dim: int) -> float:
    """Return ‖x − mean‖ / ‖x‖, the mean over one dimension."""
    return ((x - x.mean(dim, keepdim=True)).norm() / x.norm()).item()


def run(case: Case, seed: int, sick: bool) -> Outcome:
    """Train one twin and look at it."""
    began = time.process_time()
    training = case.begin(seed, sick)
    parameters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    losses = train(training)
    finite = all(bool(parameter.isfinite().all()) for parameter in training.model.parameters())
    moved = any(not torch.equal(old, new) for old, new in zip(start, parameters, strict=True))
    return Outcome(losses[0], mean(losses[-20:]), finite, moved, *judge(training), time.process_time() - began)


def verdict(case: Case, outcome: Outcome) -> str:
    """Return in which way a run failed, "" for none. For these labels only; whoever judges a run may ask for more."""
    signs = {
        "weights": not outcome.finite,
        "still": not outcome.moved,
        "tokens": outcome.residual < EQUAL,
        "samples": outcome.spread < EQUAL,
        "logits": outcome.logit > LARGE_LOGIT,
        "loss": case.chance is not None and not outcome.last < OF_CHANCE * case.chance,
    }
    return " ".join(name for name, shown in signs.items() if shown)


HEAD = f"{'case':<22} {'seed':>4} {'twin':<7} {'first':>8} {'last':>8} {'chance':>6} {'residual':>8} {'spread':>8}"


def row(case: Case, seed: int, sick: bool, outcome: Outcome) -> str:
    """Return the line of a run."""
    chance = "-" if case.chance is None else f"{case.chance:.2f}"
    return (
        f"{case.name:<22} {seed:>4} {'sick' if sick else 'healthy':<7} {outcome.first:>8.3g} {outcome.last:>8.3g}"
        f" {chance:>6} {outcome.residual:>8.2g} {outcome.spread:>8.2g} {outcome.logit:>7.3g} {outcome.seconds:>5.1f}"
        f"  {case.fails_by:<7}  {verdict(case, outcome)}"
    )


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases, all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    if unknown := set(args.names) - {case.name for case in CASES}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no hooks
    print(f"{HEAD} {'logit':>7} {'s':>5}  {'label':<7}  failed")
    for case, seed, sick in product(CASES, args.seeds, (True, False)):
        if not args.names or case.name in args.names:
            print(row(case, seed, sick, run(case, seed, sick)), flush=True)


if __name__ == "__main__":
    main()
