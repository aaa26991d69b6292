"""What is compiled is looked at too, and is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from tiny_run import CONTEXT, VOCABULARY, TinyGPT
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_spectral import Watch


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.inner(ids)
        return found


def in_place(model: TinyGPT) -> nn.Module:
    model.compile(backend="eager")
    return model


def one_block(model: TinyGPT) -> nn.Module:
    model.blocks[1].compile(backend="eager")
    return model


WAYS: Mapping[str, Callable[[TinyGPT], nn.Module]] = {
    "not": lambda model: model,
    "wrapped": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "in place": in_place,
    "inside another": lambda model: Around(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "one block": one_block,
}


def watched(way: str, *, told: bool = True) -> tuple[list[Mapping[str, float]], int]:
    """Train for 4 steps; return what was measured, and how many graphs were compiled."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    model = TinyGPT()
    called = WAYS[way](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(0))
    values = []
    with Watch(called if told else model, every_n_steps=1, on_error="raise") as watch:
        for step in range(1, 5):
            watch.before_step(ids)
            optimizer.zero_grad()
            called(ids).logsumexp(-1).mean().backward()
            optimizer.step()
            values.append(watch.step(step))
    return values, counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "not"])
def test_a_compiled_model_shows_its_tokens_and_is_compiled_once(way: str):
    expected, _ = watched("not")
    values, graphs = watched(way)
    assert graphs == 1
    for key in ("token_residual_min", "sample_residual_min", "attention_logit_max", "output_residual"):
        of = [[item[f"spectral/{key}"] for item in run] for run in (values, expected)]
        assert of[0] == pytest.approx(of[1], rel=1e-5)


@pytest.mark.parametrize("way", ["wrapped", "inside another"])
def test_a_wrapper_that_the_watch_does_not_know_compiles_nothing_of_the_watch(way: str):
    expected, _ = watched(way)
    operations = counters["stats"]["calls_captured"]
    values, graphs = watched(way, told=False)
    assert graphs <= 2  # with and without a listener in front of the model
    assert counters["stats"]["calls_captured"] == graphs * operations
    assert not any("spectral/token_residual_min" in item for item in values)
    for key in ("ratio_min", "ratio_median", "ratio_max"):
        of = [[item[f"spectral/{key}"] for item in run] for run in (values, expected)]
        assert of[0] == pytest.approx(of[1], rel=1e-5)
