"""Places for a state that one seldom thinks of, all of them written to in one forward pass."""

from __future__ import annotations

import sys
import threading
import types
from collections import UserDict
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from tiny_run import WIDTH
from torch import Tensor, nn
from torch.utils import checkpoint

GENERATOR = torch.Generator().manual_seed(1)
LOCAL = threading.local()
LOCAL.calls = 0
SETTINGS = types.ModuleType("settings_of_a_project")  # stands for a file of the user's
SETTINGS.calls, SETTINGS.seen = 0, []
SETTINGS.unused = ["never named"]
sys.modules["settings_of_a_project"] = SETTINGS
WRITTEN: list[Any] = []


class Writer(Logger):
    """A logger that is held directly, not through a Trainer."""

    name, version = "written", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        WRITTEN.append(metrics)

    def log_hyperparams(self, *_: Any) -> None:
        pass


WRITER = Writer()


class Registry:
    losses: list[float] = []  # noqa: RUF012  # of the class
    table: dict[str, Any] = {"nested": {"deep": [0]}}  # noqa: RUF012

    class Inner:
        """A class of a class."""

        count = 0

    @staticmethod
    def add(loss: float) -> None:
        Registry.losses.append(loss)
        Registry.table["nested"]["deep"][0] += 1
        Registry.Inner.count += 1


class Square(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Square.calls += 1
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Cache:
    """What a caller passes to be filled, as those of generation are."""

    __slots__ = ("keys", "length")

    def __init__(self) -> None:
        self.keys: list[Tensor] = [torch.zeros(1, 1, WIDTH)]
        self.length = 0

    def update(self, x: Tensor) -> None:
        self.keys[0] = torch.cat([self.keys[0].expand(len(x), -1, -1), x.detach()], 1)
        self.keys.append(x)
        self.length += x.shape[1]


class Changed(nn.Linear):
    """What a layer becomes in its first forward."""


class Odd(nn.Module):
    count_of_passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.aside = [nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)]  # no children: always in train mode
        self.turning, self.user = nn.Linear(WIDTH, WIDTH), UserDict(calls=0)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.scale.calls = 0  # type: ignore[attr-defined]  # an attribute of a tensor
        self.state = (torch.zeros(2), [torch.zeros(2)])
        self.register_buffer("of_a_view", torch.zeros(3, 4).t())
        self.register_buffer("resized", torch.zeros(2))
        self.inner = torch.jit.script(nn.BatchNorm1d(WIDTH))
        self.added = lambda x, seen=[]: seen.append(len(seen)) or x
        self.turning.forward = types.MethodType(turned, self.turning)
        self.table = nn.ParameterDict({"a": torch.zeros(1)})
        self.removed = 1
        self.history = torch.ones(WIDTH, requires_grad=True) * 2  # keeps a graph of its own

    def forward(self, x: Tensor, cache: Cache | None = None, batch: dict[str, Any] | None = None) -> Tensor:
        Odd.count_of_passes += 1
        type(self).created = 1
        globals()["NEW"] = 1
        if hasattr(self, "removed"):
            del self.removed
        x = x + 0.01 * torch.rand(x.shape, generator=GENERATOR)
        if batch is not None:
            x = x + batch.pop("shift")
            batch["seen"] = x
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + checkpoint.checkpoint(self.mlp, x, use_reentrant=False) * self.scale
        self.write(x)
        if cache is not None:
            cache.update(x)
        return self.turning(self.added(x)) + 0 * Square.apply(x)

    def write(self, x: Tensor) -> None:
        import settings_of_a_project as project

        project.calls += 1
        project.seen.append(1)
        LOCAL.calls += 1
        WRITER.log_metrics({"x": 1.0})
        Registry.add(float(x.detach().mean()))
        self.aside[0](x.transpose(1, 2))
        self.inner.train()
        self.inner(x.transpose(1, 2))
        self.user["calls"] += 1
        self.scale.calls += 1  # type: ignore[attr-defined]
        self.state[0].add_(1)
        self.state[1].append(x.detach())
        self.of_a_view[0] = x[0, 0, :3]
        self.resized.resize_(5)
        self.history.mul_(0.5)
        self.table["b"] = nn.Parameter(torch.zeros(1))
        self.eval() if self.training else self.train()
        self.mlp[0].weight.register_hook(lambda gradient: gradient)
        x.mean().backward(retain_graph=True)  # leaves gradients
        torch.set_default_dtype(torch.float64)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(True)


def turned(self: nn.Linear, x: Tensor) -> Tensor:
    """A forward that was put into one layer."""
    self.__class__ = Changed
    self.turns = getattr(self, "turns", 0) + 1
    self.double()
    return nn.functional.linear(x.double(), self.weight, self.bias).float()


def outside() -> list[Any]:
    """Return what is left outside of the module."""
    held = [GENERATOR, vars(LOCAL), vars(SETTINGS), Registry.losses, Registry.table, WRITTEN]
    counts = [Registry.Inner.count, Square.calls, Odd.count_of_passes, hasattr(Odd, "created"), "NEW" in globals()]
    return [*held, *counts, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()]
