"""No scale is lost on the way of a checkpoint: left out, filtered, partly loaded, brought back from other processes."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from steered import log_scales, unbalanced
from tiny_run import LitGPT, SaveAt, TinyGPT, fit, loader
from torch import Tensor, nn
from zoo import example

from lightning_spectral import ResidualRescaler, SpectralMonitor, attach_scales, find_blocks
from lightning_spectral.control.optimizers import plain_order, with_fresh_scales
from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.scales.loading import lost_scales, restore_unsaved, saved_sites
from lightning_spectral.watch.telling import warn

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
IDS = torch.arange(16).view(2, 8)


def rescaler(**settings: Any) -> ResidualRescaler:
    return ResidualRescaler(patience=1, **settings)


class SavesTrained(LitGPT):
    """Saves what it trains, as many fine-tuning recipes do; the scales are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model.load_state_dict(unbalanced().model.state_dict())
        self.model.tokens.requires_grad_(False)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitGPT]:
    """A checkpoint whose state dict has no scale, and the module that it was saved from."""
    folder, module = tmp_path_factory.mktemp("filtered"), SavesTrained()
    trainer = fit(folder, SpectralMonitor(2, rescaler(learnable=False)), module=module, max_steps=8)
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt", module


@pytest.mark.parametrize("resumes", [True, False])
def test_scales_that_the_users_code_leaves_out_come_back(tmp_path: Path, filtered: tuple[Path, LitGPT], resumes: bool):
    path, module = filtered
    saved = torch.load(path, weights_only=True)
    assert not [key for key in saved["state_dict"] if "log_scale" in key]
    again = SavesTrained()
    if resumes:
        fit(tmp_path, SpectralMonitor(50, rescaler(learnable=False)), module=again, ckpt_path=str(path), max_steps=9)
    else:
        trainer = fit(tmp_path, [], max_steps=1)
        trainer.callbacks.insert(0, SpectralMonitor(2, True))
        trainer.validate(again, loader(), ckpt_path=str(path), verbose=False)
    assert log_scales(again) == log_scales(module)
    assert all(log_scales(again))


def test_a_checkpoint_that_only_names_its_scales_is_refused(filtered: tuple[Path, LitGPT]):
    saved = torch.load(filtered[0], weights_only=True)
    del saved["lightning_spectral"]["log_scales"]  # as earlier versions marked it
    with pytest.raises(
        ConfigurationError,
        match=r"names 6 residual scales that it does not hold \(the first is at 'model\.blocks\.0\.attention'\)",
    ):
        restore_unsaved(filtered[1], saved)


def test_a_dry_run_does_not_lose_scales():
    scaled, plain = unbalanced(), unbalanced()
    attach_scales(scaled)
    steering = Steering(rescaler(dry_run=True), (0.5, 2.0))
    steering.attach(plain, None)
    handle = steering.listen(plain)
    with pytest.raises(RuntimeError, match=r"has 6 residual scales, and the model has none.*attach_scales"):
        plain.load_state_dict(scaled.state_dict(), strict=False)
    handle.remove()


def test_scales_on_branches_that_this_run_would_leave_alone_are_attached_for_them(tmp_path: Path):
    """Earlier versions scaled frozen branches; their checkpoints go on."""

    def partly_frozen() -> LitGPT:
        module = unbalanced()
        module.model.blocks[0].requires_grad_(False)
        return module

    before = partly_frozen()
    blocks = find_blocks(before)
    saver = SaveAt(tmp_path / "old.ckpt", 4)
    fit(tmp_path / "old", [SpectralMonitor(2, rescaler(), blocks=blocks), saver], module=before, batches=1, max_steps=4)
    assert len(log_scales(before)) == 6
    after = partly_frozen()
    fit(
        tmp_path / "new",
        SpectralMonitor(2, rescaler()),
        module=after,
        batches=1,
        ckpt_path=str(saver.path),
        max_steps=8,
    )
    assert log_scales(after)[:2] == log_scales(before)[:2]  # as they were: frozen, and moved no more
    assert log_scales(after)[2:] != log_scales(before)[2:]
    few = partly_frozen()
    attach_scales(few, blocks[1:])
    message = lost_scales(few, saved_sites(torch.load(saver.path, weights_only=True)))
    assert message is not None
    assert (
        "has 6 residual scales, and the model has none at model.blocks.0.attention, model.blocks.0.mlp, so" in message
    )


def test_a_state_dict_of_a_part_leaves_the_scales_as_they_are_and_a_whole_one_is_plain():
    model, plain = TinyGPT(), TinyGPT().state_dict()
    scales = attach_scales(model).parameters()

    def after(state: dict[str, Tensor], part: nn.Module = model) -> list[float]:
        with torch.no_grad():
            for scale in scales:
                scale.fill_(0.5)
        part.load_state_dict(state, strict=False)
        return [scale.item() for scale in scales]

    assert after({name: value for name, value in plain.items() if name.startswith("head")}) == [0.5] * 6
    assert after({name: value for name, value in plain.items() if name.endswith("bias")}) == [0.5] * 6
    assert after({name: value for name, value in plain.items() if name.startswith("blocks.1")}) == [
        0.5, 0.5, 0.0, 0.0, 0.5, 0.5,
    ]  # fmt: skip
    assert after(plain) == [0.0] * 6
    inner = {
        name.removeprefix("blocks.2.mlp."): value for name, value in plain.items() if name.startswith("blocks.2.mlp")
    }
    assert after(inner, model.blocks[2].mlp) == [0.5] * 5 + [0.0]
    assert after({}) == [0.5] * 6


def test_a_plain_state_dict_is_assigned_to_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = TinyGPT()
    attach_scales(model, find_blocks(TinyGPT()))
    model.load_state_dict(TinyGPT().state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert [item.log_scale.item() for item in model.modules() if isinstance(item, ResidualScale)] == [0.0] * 6


class Tell(Callback):
    """Writes down what the trained model computes, in the process that trains it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save({"outputs": pl_module.eval()(IDS).detach(), "scales": log_scales(pl_module)}, self.path)
        pl_module.train()


# torch built for CUDA forks no process that has run a backward pass: https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch built for CUDA forks only before a backward pass")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("first", [False, True])
def test_what_was_trained_in_processes_started_from_this_one_arrives(tmp_path: Path, first: bool, caplog: Any):
    """With the scales folded in; as scales where the module has them before."""
    module = unbalanced()
    if first:
        attach_scales(module)
    tell = Tell(tmp_path / "told.pt")
    fit(tmp_path, [SpectralMonitor(2, rescaler()), tell], module=module, strategy="ddp_fork", devices=1)
    told = torch.load(tell.path, weights_only=True)
    assert all(told["scales"])
    assert log_scales(module) == (told["scales"] if first else [])
    torch.testing.assert_close(module.eval()(IDS), told["outputs"], rtol=1e-4, atol=1e-5)


class Weightless(LitGPT):
    """Ends its MLPs in norms without weights."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.model.blocks:
            block.mlp.append(nn.LayerNorm(16, elementwise_affine=False))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_could_not_arrive_is_refused_before_the_first_step(tmp_path: Path):
    monitor = SpectralMonitor(2, True)
    with pytest.raises(
        Exception, match=r"3 residual scale\(s\) would be lost.*Call attach_scales\(module, learnable=False\) before"
    ):
        fit(tmp_path, monitor, module=Weightless(), strategy="ddp_fork", devices=1)


class Named(LitGPT):
    """Names the parameters in its optimizer, in groups by their number of dimensions."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [[(n, p) for n, p in self.named_parameters() if (p.ndim < 2) is small] for small in (True, False)]
        return torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)


def test_the_names_in_an_optimizer_stay_those_of_its_parameters(tmp_path: Path):
    seed_everything(0)
    fit(tmp_path / "plain", SaveAt(tmp_path / "plain.ckpt", 4), module=Named(), batches=1)
    module = Named()
    saver = tmp_path / "plain.ckpt"
    trainer = fit(tmp_path / "run", SpectralMonitor(2, True), module=module, ckpt_path=str(saver), batches=1)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["optimizer_states"][0]
    assert len(saved["param_groups"][0]["param_names"]) == len(trainer.optimizers[0].param_groups[0]["params"]) - 6


def test_the_state_of_a_plain_optimizer_finds_its_weights_where_scales_have_moved_them():
    """A scale on a weight makes the weight a parameter of another module, which comes later."""
    member = example("plain_functional_params")
    plain = member.build()
    args, kwargs = member.inputs(plain)
    blocks = find_blocks(plain, batch=args or kwargs)
    before = torch.optim.SGD(plain.parameters(), momentum=0.9)
    for parameter in plain.parameters():
        before.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    model = copy.deepcopy(plain)
    scales = attach_scales(model, blocks).parameters()
    after = torch.optim.SGD(model.parameters(), momentum=0.9)
    state = with_fresh_scales(after, before.state_dict(), scales, plain_order(model))
    assert state is not None
    after.load_state_dict(state)
    assert len(after.state) == len(list(plain.parameters()))
    for parameter, kept in after.state.items():
        assert torch.equal(parameter, kept["momentum_buffer"])


@pytest.mark.parametrize(
    "state", [{"fast_state": {}, "param_groups": []}, {"param_groups": [{"params": [0]}], "state": {7: {}}}]
)
def test_states_that_are_not_understood_are_left_to_the_optimizer(state: dict[str, Any]):
    scale = nn.Parameter(torch.zeros(1))
    assert with_fresh_scales(torch.optim.SGD([nn.Parameter(torch.zeros(2)), scale]), state, [scale]) is None


def test_a_warning_of_this_package_is_heard_where_lightning_is_mute():
    """Many set its logger to ERROR, to be spared what it says of devices."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with pytest.warns(UserWarning, match="heard"):
            warn("heard")
    finally:
        lightning.setLevel(level)
