"""What goes wrong in the monitor, around it and in the model, and what the run notices of it."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same, everything
from journals import read_actions, read_journal
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from steered import unbalanced
from tiny_run import BLOCKS, Block, LitGPT, fit
from torch import Tensor, nn

from lightning_spectral import RandomizedSVD, SpectralMonitor
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import LinearOperator, SolverState, SpectralNorm


class Breaking(RandomizedSVD):
    """A solver that fails in some of its calls."""

    calls = 0

    def __init__(self, broken: set[int], error: type[BaseException] = OSError) -> None:
        super().__init__()
        object.__setattr__(self, "broken", broken)
        object.__setattr__(self, "error", error)

    def compute(
        self, operators: Sequence[LinearOperator], state: SolverState
    ) -> tuple[tuple[SpectralNorm, ...], SolverState]:
        object.__setattr__(self, "calls", self.calls + 1)
        if self.calls - 1 in self.broken:  # type: ignore[attr-defined]
            raise self.error("no luck")  # type: ignore[attr-defined]
        return super().compute(operators, state)


class At(Callback):
    """Does something to the module at the end of one step."""

    def __init__(self, step: int, action: Callable[[LitGPT], object]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                self.action(pl_module)  # type: ignore[arg-type]


def records(folder: Path) -> list[dict[str, Any]]:
    return read_journal(folder / "spectral.jsonl")[1]


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def told(warned: Sequence[warnings.WarningMessage]) -> list[str]:
    return [text for warning in warned if "SpectralMonitor" in (text := str(warning.message))]


pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")

# Telemetry


def test_a_run_whose_measurements_fail_is_bitwise_the_unwatched_run(tmp_path: Path):
    results = []
    for name, monitors in (
        ("alone", []),
        ("watched", [SpectralMonitor(1, geometry=True, solver=Breaking({1, 3, 4, 5}))]),
    ):
        seed_everything(0)
        module = LitGPT(dropout=0.2)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            results.append(everything(module, fit(tmp_path / name, monitors, module=module, shuffle=True)))
    assert_same(*results)
    assert [record["step"] for record in records(tmp_path / "watched")] == [0, 2]
    messages = told(warned)
    assert [message.rpartition("; ")[2] for message in messages] == [
        *["training goes on"] * 3,
        "it is switched off now",
    ]
    assert all("(OSError: no luck)" in message for message in messages)


def test_a_steered_run_goes_on_with_the_scales_where_they_are(tmp_path: Path):
    module = unbalanced()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, SpectralMonitor(1, True, solver=Breaking({4, 5, 6})), module=module)
    assert trainer.global_step == 8
    assert len(told(warned)) == 3
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} == {0, 1, 2, 3}
    scales = [value.item() for name, value in module.state_dict().items() if name.endswith("log_scale")]
    assert all(abs(value) > 0.1 for value in scales)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_an_interrupt_passes_and_leaves_no_hook(tmp_path: Path, on_error: Any):
    module = LitGPT()
    monitor = SpectralMonitor(1, geometry=True, solver=Breaking({3}, KeyboardInterrupt), on_error=on_error)
    trainer: list[Trainer] = []
    with pytest.raises(SystemExit, match=r"^1$"):  # what Lightning makes of it
        fit(tmp_path, [monitor, At(2, lambda pl_module: trainer.append(pl_module.trainer))], module=module)
    assert trainer[0].interrupted
    assert trainer[0].global_step == 3
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2]
    assert hooks(module) == 0
    assert not module._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore:SpectralMonitor failed")
def test_a_run_without_a_measurement_has_no_picture(tmp_path: Path):
    trainer = fit(tmp_path, SpectralMonitor(100, solver=Breaking({0, 1})))
    assert trainer.global_step == 8
    assert records(tmp_path) == []
    assert not (tmp_path / "spectral.png").exists()


def test_a_picture_that_cannot_be_written_costs_the_picture(tmp_path: Path):
    (tmp_path / "spectral.png").mkdir()
    with pytest.warns(UserWarning, match=r"failed in drawing \(IsADirectoryError"):
        trainer = fit(tmp_path, SpectralMonitor(4))
    assert trainer.global_step == 8
    assert [record["step"] for record in records(tmp_path)] == [0, 4, 8]


def test_a_journal_that_cannot_be_opened_is_told_before_the_first_step(tmp_path: Path):
    (tmp_path / "spectral.jsonl").mkdir()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, SpectralMonitor(100))
    assert trainer.global_step == 8
    (message,) = told(warned)
    assert f"spectral.jsonl is not a file. It is kept as {tmp_path / 'spectral.damaged-1.jsonl'}" in message
    assert [record["step"] for record in records(tmp_path)] == [0, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": {"no.such.block": {"attention": "attn", "mlp": "mlp"}}}, "no.such.block"),
        ({"blocks": {"model.blocks.*": {"attention": "nowhere", "mlp": "mlp"}}}, "nowhere"),
    ],
)
@pytest.mark.parametrize("steer", [False, True])
def test_a_wrong_description_of_the_model_is_refused_before_the_first_step(
    tmp_path: Path, steer: bool, settings: dict[str, Any], message: str
):
    module = LitGPT()
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, SpectralMonitor(2, steer, **settings), module=module)
    assert module.losses == []
    assert hooks(module) == 0


# The model


class Frozen(LitGPT):
    """Steps that change nothing, so that a NaN stays where it was put."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.model.head.bias], lr=0.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.zero_grad()


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_weight_that_is_not_finite_costs_its_branch_for_as_long_as_it_lasts(tmp_path: Path, bad: float):
    kept: list[torch.Tensor] = []

    def spoil(module: LitGPT) -> None:
        weight = module.model.blocks[1].mlp[2].weight
        kept.append(weight.clone())
        weight[0, 0] = bad

    module = Frozen()
    heal = At(6, lambda module: module.model.blocks[1].mlp[2].weight.copy_(kept[0]))
    fit(tmp_path, [At(3, spoil), heal, SpectralMonitor(1, geometry=True, on_error="raise")], module=module)
    for record in records(tmp_path):
        sick = 3 <= record["step"] < 6
        (left, middle, right) = record["layers"]
        assert (middle["mlp_norm"] is None) is (middle["ratio"] is None) is sick
        assert (middle["mlp_reason"] == "weights are not finite (NaN or Inf)") is sick
        assert middle["attention_norm"] is not None
        assert left["ratio"] == pytest.approx(records(tmp_path)[0]["layers"][0]["ratio"], rel=1e-2)
        assert right["ratio"] == pytest.approx(records(tmp_path)[0]["layers"][2]["ratio"], rel=1e-2)
    # The tokens of the weights that were spoiled are not finite behind the block.
    tokens = {record["step"]: [layer["token_residual"] for layer in record["layers"]] for record in records(tmp_path)}
    for step in (3, 4, 5):
        assert tokens[step][0] is not None
        assert tokens[step][1:] == [None, None]
    assert None not in [*tokens[2], *tokens[6], *tokens[7]]


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE")
@pytest.mark.parametrize("settings", [{}, {"geometry": False}, {"auto_rescale": True}])
def test_a_diverging_run_is_watched_to_its_end(tmp_path: Path, settings: dict[str, Any]):
    module = LitGPT(learning_rate=math.inf)
    trainer = fit(tmp_path, SpectralMonitor(1, **settings, on_error="raise"), module=module)
    assert trainer.global_step == 8
    last = records(tmp_path)[-1]["layers"]
    assert [layer["ratio"] for layer in last] == [None] * BLOCKS
    assert all("not finite" in layer["reason"] for layer in last)
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} <= {0}


def cut(module: LitGPT) -> None:
    del module.model.blocks[2]


def replaced(module: LitGPT) -> None:
    module.model.blocks[1] = nn.Identity()


def pruned(module: LitGPT) -> None:
    up, _, down = module.model.blocks[1].mlp[:3]
    up.weight, up.bias = nn.Parameter(up.weight[:32].clone()), nn.Parameter(up.bias[:32].clone())
    down.weight = nn.Parameter(down.weight[:, :32].clone())


@pytest.mark.parametrize("settings", [{}, {"auto_rescale": True}])
@pytest.mark.parametrize(("surgery", "gone"), [(cut, 2), (replaced, 1), (pruned, None)])
def test_a_model_that_is_changed_while_it_trains_is_watched_as_far_as_it_goes(
    tmp_path: Path,
    surgery: Callable[[LitGPT], None],
    gone: int | None,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    monitor = SpectralMonitor(1, **settings, on_error="raise")
    module = LitGPT()
    trainer = fit(tmp_path, [At(4, surgery), monitor], module=module)
    assert trainer.global_step == 8
    last = records(tmp_path)[-1]["layers"]
    assert [layer["ratio"] is None for layer in last] == [index == gone for index in range(BLOCKS)]
    assert gone is None or "has no attribute" in last[gone]["reason"]
    tokens = [layer["token_residual"] for layer in records(tmp_path)[-2]["layers"]]
    assert tokens[0] is not None
    count = "6" if not settings else "6 .*; residual scales gone: 2"
    told = re.findall(rf"other modules than when .* \(gone: {count} in model.blocks.{gone}\)", caplog.text)
    assert len(told) == (gone is not None)


def grown(module: LitGPT) -> None:
    module.model.blocks.append(Block(0.0))


class Adapted(nn.Linear):
    """A linear layer with a path beside its weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.load_state_dict(plain.state_dict())
        self.down, self.up = nn.Linear(self.in_features, 2), nn.Linear(2, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def adapted(module: LitGPT) -> None:
    mlp = module.model.blocks[1].mlp
    mlp[0] = Adapted(mlp[0])


def renewed(module: LitGPT) -> None:
    module.model = copy.deepcopy(module.model)


def normalized(module: LitGPT) -> None:
    for linear in (module.model.blocks[0].mlp[0], module.model.blocks[1].attention.proj):
        nn.utils.parametrizations.weight_norm(linear)
    nn.utils.prune.l1_unstructured(module.model.blocks[2].mlp[0], "weight", 0.1)


def compiled(module: LitGPT) -> None:
    module.model.blocks[1] = torch.compile(module.model.blocks[1], backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.parametrize(
    ("surgery", "told"),
    [
        (grown, "new: 6 in model.blocks.3"),
        (adapted, "new: 2 in model.blocks.1.mlp.0; of another class: model.blocks.1.mlp.0"),
        (renewed, None),
        (normalized, None),
        (compiled, None),
    ],
)
def test_modules_that_come_while_a_model_trains_are_told_once(
    tmp_path: Path, surgery: Callable[[LitGPT], None], told: str | None, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    fit(tmp_path, [At(4, surgery), SpectralMonitor(1, on_error="raise")], module=LitGPT())
    assert re.findall(r"other modules than when its blocks were found \((.*?)\)", caplog.text) == (
        [told] if told else []
    )
