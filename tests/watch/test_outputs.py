"""What a model makes its output of: the right tokens of real models, and nothing left of finding them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import CONTEXT, VOCABULARY, WIDTH, TinyGPT
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_spectral import Measurement, find_blocks
from lightning_spectral.alarms import Memory, observe
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.measuring.readout import pooled_residual
from lightning_spectral.passes.listen import Listener
from lightning_spectral.records import OutputMeasurement
from lightning_spectral.watch.batch import BatchWatch
from lightning_spectral.watch.outermost import Call
from lightning_spectral.weights.model import ModelWeights

SAMPLES, PADDED = 20, 0
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES: dict[str, Any] = {"hidden_size": 16, "image_size": 16, "patch_size": 4, **SMALL}


def ids(generator: torch.Generator, samples: int = SAMPLES, length: int = CONTEXT) -> Tensor:
    return torch.randint(1, VOCABULARY, (samples, length), generator=generator)


def kept(x: Tensor) -> Tensor:
    """Return the samples that are looked at."""
    return Call(nn.Identity(), (x,), {}).shortened(min(8, max(4, len(x) // 4))).args[0]


def looked(model: nn.Module, step: Callable[[], Any], blocks: Any) -> tuple[Any, Measurement]:
    """Return what a training step returned, and what was seen of it."""
    watch = BatchWatch(model, blocks)
    watch.start()
    result = step()
    measurement = watch.add_to(Meter(ModelWeights(model), blocks).measure())
    assert not any(isinstance(vars(part).get("_compiled_call_impl"), Listener) for part in model.modules())
    assert measurement.output is not None
    return result, measurement


def output_of(model: nn.Module, step: Callable[[], Any], blocks: Any) -> OutputMeasurement:
    output = looked(model, step, blocks)[1].output
    assert output is not None
    return output


def spread(vectors: Tensor) -> Any:
    """Return how far rows are from being one, the slow way."""
    rows = vectors.double()
    return pytest.approx(float((rows - rows.mean(0)).norm() / rows.norm()), rel=1e-5)


@torch.no_grad()
def behind_last_block(model: nn.Module, blocks: Any, run: Callable[[], Any]) -> Tensor:
    """Return the stream behind the last block, in evaluation mode, by a hook."""
    seen: list[Tensor] = []
    module = model.get_submodule(blocks[-1].modules[-1])
    handle = module.register_forward_hook(
        lambda module, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    model.eval()
    run()
    model.train()
    handle.remove()
    return seen[-1]


# The number


def test_it_is_the_mean_of_the_tokens_that_have_a_gradient(generator: torch.Generator):
    X = torch.randn(5, 7, 3, generator=generator)
    gradient = torch.zeros_like(X)
    gradient[:, 2, 1] = 1e-30
    gradient[1:3, 5, 0] = -4.0
    means = torch.stack([X[b, [2, 5] if b in (1, 2) else [2]].mean(0) for b in range(5)])
    assert float(pooled_residual(X, gradient)) == spread(means)


def test_a_sample_of_which_nothing_is_read_does_not_count(generator: torch.Generator):
    X = torch.randn(4, 3, 6, generator=generator)
    gradient = torch.zeros_like(X)
    gradient[[0, 1, 3], 0] = 1.0
    assert float(pooled_residual(X, gradient)) == spread(X[[0, 1, 3], 0])
    gradient[[0, 3]] = 0.0
    assert pooled_residual(X, gradient).isnan()


def test_one_massive_dimension_hides_nothing(generator: torch.Generator):
    X = torch.randn(6, 4, 32, generator=generator)
    X[..., 3] = 1e5
    without = X.clone()
    without[..., 3] = 0.0
    gradient = torch.ones_like(X)
    assert float(pooled_residual(X, gradient)) == spread(without.mean(1))


def test_one_vector_is_read_where_all_that_is_read_has_one_gradient(generator: torch.Generator):
    X = torch.randn(4, 5, 6, generator=generator, requires_grad=True)
    for read, one in (
        (lambda x: x[:, 3], True),
        (lambda x: x[:, 1:].mean(1), True),
        (lambda x: x[:, :2].flatten(1), False),
        (lambda x: x.amax(1), False),
    ):
        weights = torch.randn(read(X).shape, generator=generator)
        (gradient,) = torch.autograd.grad(read(X), X, weights)
        assert pooled_residual(X, gradient, of_one_vector=True).isnan() == (not one)


# Real models


def vit(generator: torch.Generator) -> tuple[nn.Module, dict[str, Tensor], Any]:
    return ViTForImageClassification(ViTConfig(**IMAGES)), pictures(generator), lambda x, rows: x[rows, 0]


def bert(generator: torch.Generator) -> tuple[nn.Module, dict[str, Tensor], Any]:
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, hidden_size=16, **SMALL))
    return model, padded(generator), lambda x, rows: x[rows, 0]


def gpt2(generator: torch.Generator) -> tuple[nn.Module, dict[str, Tensor], Any]:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, pad_token_id=PADDED, num_labels=3)
    inputs = padded(generator)
    last = inputs["attention_mask"].sum(1) - 1
    return GPT2ForSequenceClassification(config), inputs, lambda x, rows: x[rows, last[rows]]


def swin(generator: torch.Generator) -> tuple[nn.Module, dict[str, Tensor], Any]:
    config = SwinConfig(
        embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2, num_labels=3
    )
    return SwinForImageClassification(config), pictures(generator), lambda x, rows: x[rows].mean(1)


def pictures(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=generator)}


def padded(generator: torch.Generator) -> dict[str, Tensor]:
    words = ids(generator)
    mask = (torch.arange(CONTEXT) <= torch.arange(SAMPLES)[:, None] % (CONTEXT - 1)).long()
    return {"input_ids": words.masked_fill(mask == 0, PADDED), "attention_mask": mask}


@pytest.mark.parametrize("make", [vit, bert, gpt2, swin])
def test_class_tokens_last_tokens_and_means_of_real_models(make: Any, generator: torch.Generator):
    torch.manual_seed(0)
    model, inputs, read = make(generator)
    blocks = find_blocks(model, batch=inputs)
    stream = behind_last_block(model, blocks, lambda: model(**inputs))
    rows = kept(torch.arange(SAMPLES))
    output = output_of(model.train(), lambda: model(**inputs).logits.sum().backward(), blocks)
    assert output.kind == "sample"
    assert output.pooled_residual == spread(read(stream, rows))


@pytest.mark.parametrize("way", ["class token", "pooler", "mean", "each token", "no loss"])
def test_what_a_training_step_reads_of_the_stream_that_a_model_returns(way: str, generator: torch.Generator):
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCABULARY, hidden_size=16, **SMALL))
    inputs = padded(generator)
    mask, head = inputs["attention_mask"][..., None], nn.Linear(16, 2)
    blocks = find_blocks(model, batch=inputs)
    stream = behind_last_block(model, blocks, lambda: model(**inputs))

    def step() -> None:
        out = model(**inputs)
        read = {
            "class token": lambda: out.last_hidden_state[:, 0],
            "pooler": lambda: out.pooler_output,
            "mean": lambda: (out.last_hidden_state * mask).sum(1) / mask.sum(1),
        }.get(way, lambda: out.last_hidden_state)()
        if way != "no loss":
            head(read).square().mean().backward()

    output = output_of(model.train(), step, blocks)
    rows = kept(torch.arange(SAMPLES))
    assert output.kind == "stream"
    if way in ("each token", "no loss"):
        assert output.pooled_residual is None
    else:
        means = (stream * mask).sum(1) / mask.sum(1)
        assert output.pooled_residual == spread((means if way == "mean" else stream[:, 0])[rows])


def test_a_language_model_reads_every_token_and_has_none(generator: torch.Generator):
    model, x = TinyGPT(), ids(generator)
    output = output_of(model, lambda: model(x).square().mean().backward(), find_blocks(model))
    assert (output.kind, output.pooled_residual) == ("token", None)


# Odd models


class Classifier(TinyGPT):
    """Reads the last token; has dropout and, in its head, a BatchNorm."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__(dropout)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.calls = 0

    def read(self, x: Tensor) -> Tensor:
        return x[:, -1]

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.read(x)))


def truth(model: Classifier, x: Tensor) -> Any:
    stream = behind_last_block(model, find_blocks(model), lambda: model(kept(x)))
    return spread(stream[:, -1])


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_left_of_the_backward_pass_through_the_head(autocast: bool, generator: torch.Generator):
    x, results = ids(generator), []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        blocks = find_blocks(model)
        expected = truth(model, x)
        model.calls = 0
        heard: list[str] = []
        model.head.register_full_backward_hook(lambda *_, heard=heard: heard.append("head"))
        model.head.weight.register_hook(lambda gradient, heard=heard: heard.append("weight"))
        torch.manual_seed(1)

        def step(model: Classifier = model) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(x).float().square().mean()
            loss.backward()
            return [loss.detach(), *(item.grad for item in model.parameters() if item.grad is not None)]

        if watched:
            result, measurement = looked(model, step, blocks)
            assert measurement.output is not None
            if not autocast:
                assert measurement.output.pooled_residual == expected
            assert measurement.output.pooled_residual is not None
        else:
            result = step()
        assert torch.is_grad_enabled()
        assert (model.calls, sorted(heard)) == (1, ["head", "weight"])
        results.append([*result, *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()])
    assert all(map(torch.equal, *results))


def test_what_a_head_changes_in_place_is_no_part_of_it(generator: torch.Generator):
    class InPlace(Classifier):
        def read(self, x: Tensor) -> Tensor:
            return x.mul_(0.5).add_(7.0)[:, -1]

    torch.manual_seed(0)
    model, x = InPlace(), ids(generator)
    reference = Classifier()
    reference.load_state_dict(model.state_dict())
    output = output_of(model, lambda: model(x).square().mean().backward(), find_blocks(model))
    assert output.pooled_residual == truth(reference, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_recomputed(reentrant: bool, generator: torch.Generator):
    class Recomputed(Classifier):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            for block in self.blocks:
                x = checkpoint(block.__call__, x, use_reentrant=reentrant)
            return self.head(self.norm(self.read(x)))

    torch.manual_seed(0)
    model, x, reference = Recomputed(0.0), ids(generator), Classifier(0.0)
    blocks = find_blocks(model)
    reference.load_state_dict(model.state_dict())
    expected = truth(reference, x)
    output = output_of(model, lambda: model(x).square().mean().backward(), blocks)
    # The reentrant way runs blocks in a function of its own, whose inputs have no gradient here.
    assert output.pooled_residual == (None if reentrant else expected)
    assert output.sample_residual is not None


def test_an_encoder_that_runs_without_gradients_is_not_looked_at_for_it(generator: torch.Generator):
    class Frozen(Classifier):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.tokens(ids)
                for block in self.blocks:
                    x = block(x)
            return self.head(self.norm(self.read(x)))

    model, x = Frozen(), ids(generator)
    output = output_of(model, lambda: model(x).square().mean().backward(), find_blocks(model))
    assert (output.kind, output.pooled_residual) == ("sample", None)


def test_a_head_that_cannot_be_recorded_costs_this_number_alone(generator: torch.Generator):
    class Numpy(Classifier):
        strict = False

        def read(self, x: Tensor) -> Tensor:
            if self.strict:
                return torch.from_numpy(x.numpy())[:, -1]  # refuses what needs a gradient
            return x[:, -1]

        def forward(self, ids: Tensor) -> Tensor:
            self.strict = self.strict and not self.training
            return super().forward(ids)

    torch.manual_seed(0)
    model, x = Numpy(), ids(generator)
    blocks = find_blocks(model)
    model.strict = True
    output = output_of(model, lambda: model(x).square().mean().backward(), blocks)
    assert output.pooled_residual is None
    assert output.sample_residual is not None
    watch = BatchWatch(model, blocks)
    for _ in range(2):
        watch.start()
        model(x).square().mean().backward()
        measurement = watch.add_to(Meter(ModelWeights(model), blocks).measure())
        assert measurement.layers[-1].token_residual is not None


def test_one_layer_that_is_used_three_times_is_read_behind_the_last(generator: torch.Generator):
    class Shared(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([self.blocks[0]] * 3)

    torch.manual_seed(0)
    model, x = Shared(), ids(generator)
    blocks, expected = find_blocks(model), truth(model, x)
    assert output_of(model, lambda: model(x).square().mean().backward(), blocks).pooled_residual == expected


@pytest.mark.parametrize("kind", ["sample", "stream"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_models_are_compiled_no_more(kind: str, wrapped: bool, generator: torch.Generator):
    class Plain(Classifier):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            for block in self.blocks:
                x = block(x)
            return x if kind == "stream" else self.head(self.norm(self.read(x)))

    torch.compiler.reset()
    torch.manual_seed(0)
    model, counter, x = Plain(), CompileCounter(), ids(generator)
    blocks, expected = find_blocks(model), truth(model, x)
    if wrapped:
        made: nn.Module = nn.ModuleDict({"inner": torch.compile(model, backend=counter)})
        called = made["inner"]
        blocks = find_blocks(made, hints={"inner._orig_mod.blocks.*": {"attention": "attention", "mlp": "mlp"}})
    else:
        model.compile(backend=counter)
        made = called = model

    def step() -> None:
        output = called(x)
        (output if kind == "sample" else output[:, -1]).square().mean().backward()

    step()
    compiled = counter.frame_count, counter.op_count
    for _ in range(2):
        output = output_of(made, step, blocks)
        assert (output.kind, output.pooled_residual) == (kind, expected)
        step()
    assert (counter.frame_count, counter.op_count) == compiled
    assert compiled[0] > 0


# A collapse that shows nowhere else


class ClassTokenFirst(TinyGPT):
    """A class token in front of causal attention: it sees nothing, and no input changes the output."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.class_token = place, nn.Parameter(torch.randn(1, 1, WIDTH))
        self.norm, self.head = nn.Identity(), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        parts = [self.tokens(ids), self.class_token.expand(len(ids), -1, -1)]
        x = torch.cat(parts[:: 1 if self.place else -1], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, self.place])


@pytest.mark.parametrize("place", [0, -1])
def test_a_class_token_that_sees_nothing_is_a_failure(place: int, generator: torch.Generator):
    torch.manual_seed(0)
    model = ClassTokenFirst(place)
    blocks, memory, told = find_blocks(model), Memory(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        x = ids(generator)

        def train(x: Tensor = x) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, 0] % 3).backward()
            optimizer.step()

        _, measurement = looked(model, train, blocks)
        assert measurement.layers[-1].sample_residual > 0.1  # the other tokens differ
        events, memory = observe(
            memory, Measurement(50 * step, "circuit", measurement.layers, output=measurement.output)
        )
        told += [event for event in events if event.level == "failure"]
    assert [event.name for event in told] == ([] if place else ["samples_collapsed"])
    if not place:
        assert told[0].step == 150
        assert "Since step 100 the vectors that the output is made of, such as class tokens, for different" in (
            told[0].message
        )
        assert told[0].values["pooled_residual"] < 1e-6
