"""A module that keeps as much from one forward pass to the next as Python has places for."""

from __future__ import annotations

import contextvars
import functools
import itertools
import random
import weakref
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchmetrics
from tiny_run import CONTEXT, VOCABULARY, WIDTH, LitGPT
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

PASSES = 0
AUXILIARY: list[Tensor] = []
CURRENT: contextvars.ContextVar[int] = contextvars.ContextVar("CURRENT", default=0)
HELD = {"seen": [0]}


@functools.lru_cache
def causal(length: int) -> Tensor:
    return torch.ones(length, length).tril()


def routed(load: Tensor, loads: list[float] = []) -> float:  # noqa: B006  # the default argument is a memory
    routed.calls += 1  # type: ignore[attr-defined]
    loads.append(float(load))
    return sum(loads[-3:])


routed.calls = 0  # type: ignore[attr-defined]


@dataclass
class Statistics:
    count: int = 0
    seen: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    count: int = 0
    last: Any = None


class Memory:
    """A store that is no module, as recurrent models have it."""

    size = 0  # of the class

    def __init__(self, owner: nn.Module) -> None:
        self.owner, self.states, self.ring = weakref.ref(owner), deque(maxlen=3), torch.zeros(4, WIDTH)

    def __call__(self, x: Tensor) -> Tensor:
        Memory.size += 1
        self.owner().calls += 1
        self.states.append(x.detach().mean((0, 1)))
        self.ring[Memory.size % 4] = x.mean((0, 1))  # of a graph: the ring gets a history
        out = x + 0.01 * sum(self.states) + 0.01 * self.ring.mean(0)
        self.ring = self.ring.detach()
        return out

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a memory is not copied")


def counting_hook(total: list[float]) -> Any:
    """A hook of the user's that computes weights from what it has seen: a closure."""
    calls = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        total.append(1 / calls)
        return output * (1 + 0.01 * total[-1])

    return hook


class Restless(LitGPT):
    passes_of_the_class = 0

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.generator = torch.Generator().manual_seed(3)
        self.numpy, self.legacy, self.python = np.random.default_rng(4), np.random.RandomState(5), random.Random(6)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mask", torch.ones(1, 1))
        self.register_buffer("window", torch.zeros(2, 3, WIDTH)[1])
        self.memory, self.calls, self.store = None, 0, Memory(self)
        self.auxiliary: list[Tensor] = []
        self.caches: dict[str, Any] = {"old": [1]}
        self.counted, self.order, self.groups = Counter("ab"), OrderedDict(a=1, b=2), defaultdict(list)
        self.statistics, self.slotted, self.chosen = Statistics(), Slotted(), {1, 2}
        self.steps, self.letters, self.turns = itertools.count(), iter("abcdefgh" * 999), itertools.cycle([1.0, 1.1])
        self.bytes, self.numbers, self.array = bytearray(b"abc"), np.zeros(3), array("d", [0.0, 0.0])
        self.size, self.sizes = torchmetrics.MeanMetric(), torchmetrics.MetricCollection([torchmetrics.MaxMetric()])
        self.normed = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.pruned = prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.5)
        self.frozen = nn.Parameter(torch.ones(WIDTH))
        total: list[float] = []
        self.model.blocks[0].register_forward_hook(counting_hook(total))
        self.model.blocks[1].register_forward_pre_hook(functools.partial(_count, self.counted))
        self.model.blocks[2].register_forward_hook(self.note_block)
        self.keep_size = self.log  # a bound method of the framework's

    @property
    def example_input_array(self) -> Tensor:
        return torch.randint(VOCABULARY, (2, CONTEXT))  # drawn anew, from the global stream

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        pass

    def note_block(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.caches[f"block {len(self.caches)}"] = output.detach()

    @functools.cached_property
    def table(self) -> Tensor:
        return torch.randn(WIDTH, generator=self.generator)

    def forward(self, ids: Tensor) -> Tensor:
        global PASSES
        PASSES += 1
        HELD["seen"].append(PASSES)
        Restless.passes_of_the_class += 1
        CURRENT.set(CURRENT.get() + 1)
        keep = torch.rand(ids.shape, generator=self.generator) > 0.1
        logits = self.stream(ids * keep)
        self.count(logits)
        self.tell(logits)
        return logits / self.scale * min(1.0, PASSES / 3) * next(self.turns)

    def stream(self, ids: Tensor) -> Tensor:
        x = self.model.tokens(ids) + 0.01 * self.table * self.numpy.random() * self.python.random()
        if self.memory is not None:
            x = x + 0.1 * self.memory  # of one batch size only
        if len(self.mask) < ids.shape[1]:
            self.mask = causal(ids.shape[1])
        x = self.store(x * self.frozen)
        for block in self.model.blocks:
            x = block(x)
        self.memory = x.detach().mean(1, keepdim=True)
        self.window.copy_(x.detach()[0, :3])
        self.window[0] = x[0, 0]  # with a history
        self.window = self.window.detach()
        x = self.pruned(self.normed(x)) * (1 + 0.01 * float(self.legacy.rand()))
        return self.model.head(self.model.norm(x.transpose(1, 2)).transpose(1, 2))

    def count(self, logits: Tensor) -> None:
        self.scale = 0.9 * self.scale + 0.1 * logits.detach().std()
        self.auxiliary.append(logits.pow(2).mean())
        AUXILIARY.append(logits.detach().abs().mean())
        self.caches["load"] = routed(logits.detach().mean()) + next(self.steps) + ord(next(self.letters))
        self.groups["new"].append(len(self.auxiliary))
        self.order.move_to_end("a")
        self.statistics.count += 1
        self.statistics.seen.append(self.statistics.count)
        self.slotted.count, self.slotted.last = self.slotted.count + 1, logits.detach()
        self.chosen.add(len(self.chosen) + 5)
        self.bytes.append(7)
        self.numbers += 1
        self.array[0] += 1
        self.frozen.data = self.frozen.data * 0.999
        self.frozen.requires_grad_(self.statistics.count % 2 == 0)
        self.size.update(logits.detach().abs().mean())
        self.sizes.update(logits.detach().mean())
        self.late = nn.Linear(1, 1) if self.statistics.count == 1 else self.late

    def tell(self, logits: Tensor) -> None:
        if self._trainer is None or not self.trainer.training:
            return
        size = logits.detach().abs().mean()
        self.log("size", size, prog_bar=True)
        self.log_dict({"half": size / 2})
        self.keep_size("kept", size)
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(size)}, step=self.trainer.global_step)
            self.logger.experiment.log_metrics({"deep": float(size)}, step=self.global_step)

    def loss(self, ids: Tensor) -> Tensor:
        loss = super().loss(ids) + 0.01 * sum(self.auxiliary) + 0.01 * AUXILIARY[-1] + 1e-5 * self.caches["load"]
        self.auxiliary.clear()
        return loss


def _count(counted: Counter[str], module: nn.Module, args: Any) -> None:
    counted["calls"] += 1


def fresh(kind: type[Restless] = Restless) -> Restless:
    """Return a new one, with everything that lies outside of modules as at the start."""
    global PASSES
    PASSES, HELD["seen"], Restless.passes_of_the_class, Memory.size = 0, [0], 0, 0
    AUXILIARY.clear()
    CURRENT.set(0)
    causal.cache_clear()
    routed.calls = 0  # type: ignore[attr-defined]
    routed.__defaults__[0].clear()  # type: ignore[index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def outside() -> list[Any]:
    """Return what the passes have left outside of modules."""
    held = [AUXILIARY, HELD, vars(routed), routed.__defaults__]
    return [*held, PASSES, CURRENT.get(), Restless.passes_of_the_class, Memory.size, causal.cache_info().currsize]


class PickyRestless(Restless):
    """Takes an input that nobody would guess: its blocks are found in its first batch."""

    example_input_array = None  # type: ignore[assignment]

    def forward(self, batch: dict[str, Tensor] | Tensor) -> Tensor:
        assert isinstance(batch, dict)
        batch.setdefault("seen", batch["ids"])
        return super().forward(batch.pop("ids") - 1000)

    def __call__(self, ids: Any) -> Any:
        return super().__call__({"ids": ids + 1000} if isinstance(ids, Tensor) else ids)
