"""The evaluation pass of a measured step: right numbers of the right samples, and nothing left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import CONTEXT, VOCABULARY, WIDTH, TinyGPT
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lightning_spectral import Measurement, find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.passes.listen import Listener
from lightning_spectral.tokens import sample_residual, token_residual
from lightning_spectral.watch.batch import BatchWatch
from lightning_spectral.watch.outermost import Call
from lightning_spectral.weights.model import ModelWeights

SAMPLES = 20


def ids(generator: torch.Generator, samples: int = SAMPLES, length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCABULARY, (samples, length), generator=generator)


def kept(x: Tensor) -> Tensor:
    """Return the samples that are looked at."""
    return Call(nn.Identity(), (x,), {}).shortened(min(8, max(4, len(x) // 4))).args[0]


def looked(model: nn.Module, step: Callable[[], Any], blocks: Any = None) -> tuple[Any, Measurement]:
    """Return what a training step returned, and what was seen of it."""
    blocks = find_blocks(model) if blocks is None else blocks
    watch = BatchWatch(model, blocks)
    watch.start()
    result = step()
    assert watch.heard
    assert watch.complete
    measurement = watch.add_to(Meter(ModelWeights(model), blocks).measure())
    assert not any(isinstance(vars(part).get("_compiled_call_impl"), Listener) for part in model.modules())
    return result, measurement


@torch.no_grad()
def truth(model: TinyGPT, x: Tensor) -> list[tuple[float, float]]:
    """Return token and sample residual behind every block, of a pass in evaluation mode that is made by hand."""
    was, found = [part.training for part in model.modules()], []
    model.eval()
    x = model.tokens(x)
    for block in model.blocks:
        x = block(x)
        found.append((float(token_residual(x).mean()), float(sample_residual(x))))
    for part, mode in zip(model.modules(), was, strict=True):
        part.training = mode
    return found


def residuals(measurement: Measurement) -> list[tuple[float | None, float | None]]:
    return [(layer.token_residual, layer.sample_residual) for layer in measurement]


class Odd(TinyGPT):
    """Has dropout, stochastic depth, a generator of its own, a counter, a cache and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.generator, self.calls, self.cache = torch.Generator().manual_seed(3), 0, []

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.cache.append(ids)
        x = self.tokens(ids)
        for block in self.blocks:
            if not self.training or torch.rand((), generator=self.generator) > 0.3:
                x = block(x)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def step_of(model: nn.Module, x: Tensor) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    return step


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [lambda: TinyGPT(0.5), Odd], ids=["dropout", "odd"])
def test_it_is_a_pass_in_evaluation_mode_and_nothing_is_left_of_it(
    kind: Any, autocast: bool, generator: torch.Generator
):
    x, results = ids(generator), []
    for watched in (False, True):
        torch.manual_seed(0)
        model = kind()
        blocks = find_blocks(model)
        expected = truth(model, kept(x)) if not autocast else None
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if watched:
                result, measurement = looked(model, step_of(model, x), blocks)
            else:
                result = step_of(model, x)()
        buffers = [buffer.clone() for buffer in model.buffers()]
        results.append([*result, *buffers, torch.get_rng_state()])
        if isinstance(model, Odd):
            assert model.calls == len(model.cache) == 1
            results[-1].append(model.generator.get_state())
        assert all(part.training for part in model.modules())
    assert len(results[0]) == len(results[1]) > 8
    assert all(map(torch.equal, *results))
    if expected is not None:
        assert residuals(measurement) == [pytest.approx(pair, rel=1e-6) for pair in expected]


@pytest.mark.parametrize("known", [False, True])
def test_casts_of_weights_that_autocast_keeps_are_those_of_the_real_pass(known: bool, generator: torch.Generator):
    """A cast that is made without grad mode and kept would give the weights no gradient."""
    model, x = TinyGPT(), ids(generator)
    blocks = find_blocks(model)
    with torch.autocast("cpu", torch.bfloat16):
        if known:  # casts of an earlier pass within the same autocast stay
            model(x)
        looked(model, step_of(model, x), blocks)
        assert torch.is_autocast_cache_enabled()
    assert all(p.grad is not None for p in model.parameters())


# Which samples


def test_a_quarter_of_the_samples_but_no_fewer_than_4_and_no_more_than_8(generator: torch.Generator):
    for samples, expected in ((2, 2), (4, 4), (9, 4), (24, 6), (100, 8)):
        sizes: list[int] = []
        model = TinyGPT()
        model.tokens.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(len(args[0])))
        blocks = find_blocks(model)
        watch = BatchWatch(model, blocks)
        sizes.clear()
        watch.start()
        model(ids(generator, samples))
        watch.stop()
        # What a hook appends to a list that a closure holds is put back, too.
        assert sizes == [samples]
        assert len(kept(ids(generator, samples))) == expected


class Masked(nn.Module):
    """Takes a mask ``(T, T)``, positions ``(T,)`` and a word, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.places = TinyGPT(), nn.Embedding(CONTEXT, WIDTH)
        self.least = 0

    def forward(
        self, ids: Tensor, *, mask: Tensor, positions: Tensor | None = None, word: str = ""
    ) -> dict[str, Tensor]:
        if len(ids) < self.least:
            raise ValueError("too few samples")
        x = self.model.tokens(ids) + self.places(torch.arange(CONTEXT) if positions is None else positions)
        for block in self.model.blocks:
            x = block(x) + 0 * mask.float().sum(-1)[:, None]
        return {"loss": x.mean(), "logits": self.model.head(x)}


@pytest.mark.parametrize("given", ["mask", "integers", "as many samples as tokens", "refused"])
def test_tensors_of_another_length_stay_whole(given: str, generator: torch.Generator):
    model, samples = Masked(), CONTEXT if given == "as many samples as tokens" else SAMPLES
    x, mask = ids(generator, samples), torch.ones(CONTEXT, CONTEXT).tril()
    kwargs: dict[str, Any] = {"mask": mask}
    if given == "integers":
        kwargs["positions"] = torch.arange(CONTEXT)
    blocks = find_blocks(model, batch={"ids": x, **kwargs})
    model.least = SAMPLES if given == "refused" else 0
    few = kept(x) if given == "mask" else x  # all of them where that is safer, or fewer were refused
    result, measurement = looked(model, lambda: model(x, **kwargs, word="any"), blocks)
    assert len(result["logits"]) == samples
    assert measurement.output is not None
    with torch.no_grad():
        logits = model.eval()(x, **kwargs)["logits"].flatten(1)
    model.least = 0
    seen = logits if few is x else kept(logits)
    assert measurement.output.sample_residual == pytest.approx(float(token_residual(seen)), rel=1e-5)
    assert measurement.output.batch_residual == pytest.approx(float(token_residual(logits)), rel=1e-1)


def test_indices_never_point_past_the_samples_that_are_kept():
    """On a GPU this would break off the run."""
    nodes, edges = torch.randn(30, 4), torch.tensor([[0, 29], [29, 0]])
    assert Call(nn.Identity(), (nodes, edges), {}).shortened(4).args[0] is nodes
    packed, bounds = torch.arange(30), torch.tensor([0, 10, 30], dtype=torch.int32)
    assert Call(nn.Identity(), (packed,), {"bounds": bounds}).shortened(4).args[0] is packed
    labels = torch.arange(30)
    short = Call(nn.Identity(), (nodes, labels), {"mask": torch.ones(4, 4)}).shortened(4)
    assert torch.equal(nodes[short.args[1]], short.args[0])
    assert short.kwargs["mask"].shape == (4, 4)


def test_streams_with_tokens_first_are_looked_at_whole(generator: torch.Generator):
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    model, x = First(), torch.randn(CONTEXT, 12, WIDTH, generator=generator)
    _, measurement = looked(model, lambda: model(x), find_blocks(model, batch=x))
    with torch.no_grad():
        y = model.encoder.layers[0](x).transpose(0, 1)
    assert measurement.layers[0].token_residual == pytest.approx(float(token_residual(y[::2]).mean()), rel=1e-5)
    assert measurement.output is None  # nobody knows where its samples are


# Which calls


def test_calls_without_grad_mode_show_nothing(generator: torch.Generator):
    model = TinyGPT()
    watch = BatchWatch(model, find_blocks(model))
    watch.start()
    with torch.no_grad():
        model(ids(generator))
    assert not watch.heard
    assert not watch.complete
    watch.stop()


def test_layers_that_are_called_in_turn_are_seen_each(generator: torch.Generator):
    model, x = TinyGPT(0.5), ids(generator)

    def step() -> Tensor:
        y = model.tokens(x)
        for block in model.blocks:
            y = block(y)
        return y

    _, measurement = looked(model, step)
    assert all(layer.token_residual is not None for layer in measurement)
    assert residuals(measurement)[0] == pytest.approx(truth(model, kept(x))[0], rel=1e-6)


def test_an_encoder_and_a_decoder_that_are_called_apart(generator: torch.Generator):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, 2, 32, **settings), 2, enable_nested_tensor=False
            )
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, **settings), 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.decoder(y, self.encoder(x))

    model = Both()
    x, y = (torch.randn(SAMPLES, length, WIDTH, generator=generator) for length in (6, 4))
    _, measurement = looked(model, lambda: model.decoder(y, model.encoder(x)), find_blocks(model, batch=(x, y)))
    assert len(measurement.layers) == 4
    assert all(layer.token_residual is not None for layer in measurement)
    assert all(layer.functional is not None and layer.functional.attention_logit is not None for layer in measurement)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_in_the_backward_pass_starts_no_pass(reentrant: bool, generator: torch.Generator):
    passes: list[bool] = []
    model, x = TinyGPT(), ids(generator)
    blocks = find_blocks(model)

    def forward(ids: Tensor) -> Tensor:
        y = model.tokens(ids)
        for block in model.blocks:
            y = checkpoint(block.__call__, y, use_reentrant=reentrant)
        return model.head(y)

    model.forward = forward  # type: ignore[method-assign]
    watch = BatchWatch(model, blocks)
    run = watch._run
    watch._run = lambda call, reads: (passes.append(call.module is model), run(call, reads=reads))  # type: ignore[method-assign]
    watch.start()
    model(x).mean().backward()
    watch.stop()
    assert passes == [True]


def test_a_model_that_refuses_evaluation_costs_the_tokens_and_no_training(generator: torch.Generator):
    class Refusing(TinyGPT):
        strict = False

        def forward(self, ids: Tensor) -> Tensor:
            if self.strict and not self.training:
                raise RuntimeError("train me")
            return super().forward(ids)

    model, x = Refusing(), ids(generator)
    blocks = find_blocks(model)
    model.strict = True
    alone = step_of(model, x)()
    model.norm.reset_running_stats()
    watch = BatchWatch(model, blocks)
    watch.start()
    watched = step_of(model, x)()
    assert all(map(torch.equal, alone, watched))
    with pytest.raises(RuntimeError, match="train me"):
        watch.add_to(Meter(ModelWeights(model), blocks).measure())


def test_outputs_that_cannot_be_looked_at_stop_nothing(generator: torch.Generator):
    class Empty(TinyGPT):
        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids)[:, :0]

    model = Empty()
    result, measurement = looked(model, lambda: model(ids(generator)))
    assert result.shape == (SAMPLES, 0, VOCABULARY)
    assert measurement.output is None


class Cached(TinyGPT):
    """Keeps a cache that its caller passes in."""

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            if cache.keys is not None and len(cache.keys) != len(ids):
                raise ValueError("another batch")
            cache.keys = ids if cache.keys is None else torch.cat([cache.keys, ids], 1)
        return super().forward(ids)


class Cache:
    keys: Tensor | None = None


def test_a_cache_among_the_arguments_is_put_back(generator: torch.Generator):
    model, x, cache = Cached(), ids(generator), Cache()
    blocks = find_blocks(model, batch=x)
    looked(model, lambda: model(x, cache), blocks)
    assert cache.keys is x
    looked(model, lambda: model(x, cache), blocks)  # few samples do not fit to it, and all do
    assert cache.keys.shape == (SAMPLES, 2 * CONTEXT)


# Compiled


def whole_in_place(model: TinyGPT, counter: CompileCounter) -> nn.Module:
    model.compile(backend=counter)
    return model


def whole_wrapped(model: TinyGPT, counter: CompileCounter) -> nn.Module:
    return nn.ModuleDict({"inner": torch.compile(model, backend=counter)})


def parts(model: TinyGPT, counter: CompileCounter) -> nn.Module:
    for block in model.blocks:
        block.mlp = torch.compile(block.mlp, backend=counter)
        block.attention.compile(backend=counter)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", [whole_in_place, whole_wrapped, parts])
def test_compiled_models_have_tokens_and_are_compiled_no_more(way: Any, generator: torch.Generator):
    torch.compiler.reset()
    model, counter, x = TinyGPT(0.5), CompileCounter(), ids(generator)
    expected = truth(model, kept(x))
    made = way(model, counter)
    called = made["inner"] if isinstance(made, nn.ModuleDict) else made
    blocks = find_blocks(made) if made is model else find_blocks(made, batch=None, hints=_named())
    step_of(called, x)()
    frames, operations = counter.frame_count, counter.op_count
    for _ in range(2):
        _, measurement = looked(made, step_of(called, x), blocks)
        assert residuals(measurement) == [pytest.approx(pair, rel=1e-5) for pair in expected]
        step_of(called, x)()
    assert frames > 0
    assert (counter.frame_count, counter.op_count) == (frames, operations)


def _named() -> dict[str, Any]:
    return {"inner._orig_mod.blocks.*": {"attention": "attention", "mlp": "mlp"}}


def test_replicas_of_another_thread_are_no_part_of_the_model(generator: torch.Generator):
    model, x = TinyGPT(), ids(generator)

    def step() -> Tensor:
        replica = model._replicate_for_data_parallel()  # as nn.DataParallel makes them, a shallow copy
        replica._modules = model._modules
        return replica(x) + model(x)

    _, measurement = looked(model, step)
    assert residuals(measurement) == [pytest.approx(pair, rel=1e-6) for pair in truth(model, kept(x))]
