"""Of the calls of a training step, the first that trains is shown; no pass, copy, pickle or compiled frame notices."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same, everything
from journals import read_journal
from lightning.pytorch import LightningModule, seed_everything
from tiny_run import CONTEXT, VOCABULARY, WIDTH, LitGPT, PickyLitGPT, fit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_spectral import SpectralMonitor, find_blocks
from lightning_spectral.tokens import token_residual

pytestmark = pytest.mark.usefixtures("undrawn")


def heard(folder: Path) -> dict[int, list[float | None]]:
    records = read_journal(folder / "spectral.jsonl")[1]
    return {record["step"]: [layer["token_residual"] for layer in record["layers"]] for record in records}


def updates(folder: Path) -> dict[int, list[Any]]:
    records = read_journal(folder / "spectral.jsonl")[1]
    return {record["step"]: [layer["functional"] for layer in record["layers"]] for record in records}


class Remembering(LitGPT):
    """Knows the token residual behind every block, in the pass that it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.truth: dict[int, list[float]] = {}

    @torch.no_grad()
    def remember(self, ids: Tensor) -> None:
        x, found = self.model.tokens(ids), []
        for block in self.model.blocks:
            x = block(x)
            found.append(float(token_residual(x).mean()))
        self.truth[self.global_step] = found

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.remember(batch[:, :-1])
        return super().training_step(batch, batch_idx)


class Decoding(Remembering):
    """Decodes between the pass that trains and its loss, one token after another."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.eval()
        with torch.no_grad():
            ids = batch[:, :1]
            for _ in range(4):
                ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        self.train()
        return loss


class Detached(Remembering):
    """Makes a target with the same model and grad mode on, and uses no graph of it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        target = self(batch.flip(0)[:, :2]).detach().softmax(-1)
        return loss + 0 * target.mean()


class Views(Remembering):
    """Two views, of which the second one is trained too."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.loss(batch.flip(1))


class Decoded(Remembering):
    """Trains on what it decodes with grad mode on, token by token, before it trains on the batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        decoded = sum(self(batch[:, : length + 1]).mean() for length in range(3))
        return super().training_step(batch, batch_idx) + 0 * decoded


class Recomputed(Remembering):
    """Runs its blocks once more in the backward pass."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        for block in self.model.blocks:
            block.inner = block.forward
            block.forward = lambda x, block=block: checkpoint(block.inner, x, use_reentrant=self.reentrant)


class RecomputedReentrantly(Recomputed):
    reentrant = True


class ByHand(Remembering):
    """Trains by hand, and looks at what it has trained afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        with torch.no_grad():
            self(batch[:, :3])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", [Decoding, Decoded, Detached, Views, Recomputed, RecomputedReentrantly, ByHand])
def test_the_pass_that_trained_counts(tmp_path: Path, kind: type[Remembering]):
    module = kind()
    fit(tmp_path, SpectralMonitor(1, geometry=True, on_error="raise"), module=module, max_steps=3)
    found = heard(tmp_path)
    assert found.pop(3) == [None] * 3  # no pass used the last weights
    assert found == {step: pytest.approx(truth, rel=1e-5) for step, truth in module.truth.items()}
    assert all(pair["update_ratio"] > 0 for step in found for pair in updates(tmp_path)[step])


def test_of_accumulated_batches_each_uses_the_same_weights_and_the_first_counts(tmp_path: Path):
    class First(Remembering):
        def remember(self, ids: Tensor) -> None:
            if self.global_step not in self.truth:
                super().remember(ids)

    module = First()
    fit(tmp_path, SpectralMonitor(1, geometry=True), module=module, max_steps=2, accumulate_grad_batches=2)
    assert {step: heard(tmp_path)[step] for step in (0, 1)} == {s: pytest.approx(t) for s, t in module.truth.items()}


def test_one_token_has_no_geometry_and_two_have(tmp_path: Path):
    class Short(LitGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch[:, : 2 + batch_idx % 2], batch_idx)  # one token predicts the next

    fit(tmp_path, SpectralMonitor(1, geometry=True, on_error="raise"), module=Short(), max_steps=4)
    assert [value is None for value in (layers[0] for layers in heard(tmp_path).values())] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert all(
        layer["typical_token_residual"] is None or layer["typical_token_residual"] > 0 for layer in _layers(tmp_path)
    )
    assert all(layer["effective_rank"] is None for layer in read_journal(tmp_path / "spectral.jsonl")[1][0]["layers"])


def _layers(folder: Path) -> list[dict[str, Any]]:
    return [layer for record in read_journal(folder / "spectral.jsonl")[1] for layer in record["layers"]]


def test_a_frozen_model_is_heard_where_its_passes_are_those_of_training(tmp_path: Path):
    """A head is trained on it: nothing in it can be trained, and its tokens are those that the head sees."""

    class Probe(Remembering):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.model.requires_grad_(False)
            self.model.head.requires_grad_(True)
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    module = Probe()
    fit(tmp_path, SpectralMonitor(1, geometry=True), module=module, max_steps=2)
    assert {step: heard(tmp_path)[step] for step in (0, 1)} == {s: pytest.approx(t) for s, t in module.truth.items()}


# nn.TransformerEncoder, whose kernels are fused in evaluation


class Encoder(LightningModule):
    """Classifies padded sequences, and decodes in evaluation mode within its training step."""

    def __init__(self, *, frozen: bool, **settings: Any) -> None:
        super().__init__()
        self.frozen = frozen
        self.tokens, self.losses = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0), []
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, **settings)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 2)
        if frozen:
            self.tokens.requires_grad_(False)
            self.encoder.requires_grad_(False).eval()

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder.training):
            x = self.encoder(self.tokens(ids), src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding[..., None], 0).sum(1))

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(ids), ids[:, 0] % 2)
        if not self.frozen:
            self.eval()
            with torch.no_grad():
                seen = self(ids).mean()  # fused
            self.train()
            loss = loss + seen
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def padded() -> DataLoader[Any]:
    ids = torch.randint(1, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(7))
    for row in range(8):
        ids[row, CONTEXT - row % 4 :] = 0
    return DataLoader(ids, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("settings", [{}, {"norm_first": True}])
def test_fused_kernels_stay_fused(
    tmp_path: Path, settings: dict[str, Any], frozen: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tiny_run.loader", lambda **_: padded())
    losses = []
    for watch in ([], [SpectralMonitor(1, geometry=True, on_error="raise")]):
        seed_everything(0)
        module = Encoder(frozen=frozen, **settings)
        fit(tmp_path / str(len(watch)), watch, module=module, max_steps=4)
        losses.append(module.losses)
    assert losses[0] == losses[1]
    values = [value for layers in heard(tmp_path / "1").values() for value in layers]
    assert all(layer["ratio"] is not None for layer in _layers(tmp_path / "1"))
    # Also of a frozen encoder, whose pass is in evaluation mode: a head is trained on it.
    assert [value is None for value in values] == [False] * 8 + [True] * 2


def test_tokens_that_cannot_be_measured_cost_the_tokens_and_are_told_once(tmp_path: Path):
    class Ragged(LitGPT):
        """Its blocks return nested tensors beside what they return."""

        def __init__(self) -> None:
            super().__init__()
            for block in self.model.blocks:
                block.register_forward_hook(lambda module, args, x: (torch.nested.nested_tensor([*x]), x))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.model.tokens(ids)
            for block in self.model.blocks:
                x = block(x)[1]
            return self.model.head(x)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(tmp_path, SpectralMonitor(1, geometry=True, blocks=_blocks()), module=Ragged(), max_steps=3)
    told = [text for warning in warned if "SpectralMonitor" in (text := str(warning.message))]
    assert len(told) == 1
    assert "no token geometry at step 0 (TypeError: the stream is a nested tensor" in told[0]
    assert list(heard(tmp_path)) == [0, 1, 2, 3]
    assert all(layer["ratio"] is not None for layer in _layers(tmp_path))


def _blocks() -> Any:
    return find_blocks(LitGPT())


# Copies and pickles that are made within a step


class Copying(LitGPT):
    """Copies and saves its model in every way there is, while it is listened to."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["copies"] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        shallow = copy.copy(self.model.blocks[0])
        shallow.forward = lambda x: x + 1  # what it does is its own
        assert torch.equal(shallow(torch.zeros(2)), torch.ones(2))
        loaded = torch.load(buffer, weights_only=False)
        made = [copy.deepcopy(self.model), loaded, pickle.loads(pickle.dumps(self.model)), copy.deepcopy(self).model]
        self.__dict__["copies"] += made
        for one in made:
            one(batch).mean().backward()  # trains as well, and is not the model
        return super().training_step(batch, batch_idx)


def assert_bare(module: nn.Module) -> None:
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert vars(part).get("_compiled_call_impl") is None


def test_copies_hear_nothing_are_heard_by_nobody_and_keep_nothing(tmp_path: Path):
    ends = []
    for kind in (LitGPT, Copying):
        seed_everything(0)
        module = kind()
        fit(tmp_path / kind.__name__, SpectralMonitor(1, geometry=True, on_error="raise"), module=module, max_steps=2)
        ends.append((module.losses, heard(tmp_path / kind.__name__), updates(tmp_path / kind.__name__)))
    assert ends[0] == ends[1]
    for copied in module.copies:  # type: ignore[attr-defined]
        assert_bare(copied)


def test_nor_do_copies_made_while_the_first_pass_is_awaited(tmp_path: Path):
    class Picky(PickyLitGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.__dict__["copied"] = copy.deepcopy(self)
            pickle.dumps(self.model)
            return super().training_step(batch, batch_idx)

    module = Picky()
    fit(tmp_path, SpectralMonitor(1, geometry=True, on_error="raise"), module=module, max_steps=1)
    assert list(heard(tmp_path)) == [1]
    for one in (module, module.copied):
        assert_bare(one)


# Compiled code


def in_attention(module: LitGPT, counter: CompileCounter) -> None:
    for block in module.model.blocks:
        block.attention.compile(backend=counter)


def wrapped_mlp(module: LitGPT, counter: CompileCounter) -> None:
    for block in module.model.blocks:
        block.mlp = torch.compile(block.mlp, backend=counter)


def beside(module: LitGPT, counter: CompileCounter) -> None:
    """Compiled code stands beside the module that it was made of, and is called in its place."""
    for block in module.model.blocks:
        block.fast = torch.compile(block.mlp, backend=counter)
        block.forward = lambda x, block=block: _added(x, block)


def _added(x: Tensor, block: Any) -> Tensor:
    x = x + block.attention(block.norm1(x))
    return x + block.fast(block.norm2(x))


def a_function(module: LitGPT, counter: CompileCounter) -> None:
    module.loss = torch.compile(module.loss, backend=counter)  # type: ignore[method-assign]


WAYS = {"attention in place": in_attention, "MLP wrapped": wrapped_mlp, "MLP beside": beside, "the loss": a_function}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", WAYS)
def test_parts_that_are_compiled_are_compiled_once(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    ends = []
    for name, watch in (("alone", []), ("watched", [SpectralMonitor(2, geometry=True, on_error="raise")])):
        torch.compiler.reset()
        seed_everything(0)
        module, counter = LitGPT(), CompileCounter()
        WAYS[way](module, counter)
        trainer = fit(tmp_path / name, watch, module=module, max_steps=5)
        ends.append((counter.frame_count, counter.op_count, everything(module, trainer)))
    assert ends[0][0] > 0
    assert_same(*ends)
    for seen in (heard, updates):
        assert (None in seen(tmp_path / "watched")[4]) is (way == "the loss")
    silent = "no token geometry at step 0, because no call of the model in grad mode was heard"
    assert (silent in caplog.text) is (way == "the loss")  # elsewhere the model is called by code that Python runs
    assert all(layer["ratio"] is not None for layer in _layers(tmp_path / "watched"))
