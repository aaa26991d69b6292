"""Fine-tuning of small models of transformers that were pretrained here, adapters, and decoding while training."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

from .data import BYTES, TOPICS, WORDS, cross_entropy, text_entropy, topics, windows
from .parts import LowRank
from .register import Training, batches, case, generator, supervised, warm_up

WIDTH, LAYERS, LENGTH, CONTEXT = 48, 6, 24, 24
MASK = 0
topic_words = topics(LENGTH)


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Map (batch, tokens) to logits; a cache holds the tokens before and takes these up."""
        if cache is None:
            return self.inner(ids).logits
        return self.inner(ids, past_key_values=cache).logits


def bert_config(dropout: float) -> BertConfig:
    """Return the configuration of a small BERT."""
    return BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=TOPICS,
    )


@cache
def pretrained_bert(seed: int, steps: int = 200) -> dict[str, Tensor]:
    """Pretrain for a few seconds, and return the state of the encoder.

    Hidden words are guessed, the others repeated: without these, every token would need the topic and nothing else.
    """
    torch.manual_seed(seed)
    model = BertForMaskedLM(bert_config(0.1)).train()
    optimizer = AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * warm_up(40)(step)
        numbers = generator(seed, 500_000 + step)
        (ids,), _ = topic_words(numbers, 16)
        hidden = torch.rand(ids.shape, generator=numbers) < 0.3
        logits = model(ids.masked_fill(hidden, MASK)).logits
        optimizer.zero_grad()
        cross_entropy(logits, ids).backward()
        optimizer.step()
    return model.bert.state_dict()


def bert_classifier(seed: int, dropout: float = 0.1) -> Logits:
    """Return a classifier of topics on top of the pretrained encoder."""
    state = pretrained_bert(seed)
    torch.manual_seed(seed)  # the same start whether or not the pretraining was cached
    model = BertForSequenceClassification(bert_config(dropout))
    model.bert.load_state_dict(state, strict=False)
    return Logits(model)


def fine_tune(seed: int, rate: float, steps: int, dropout: float = 0.1) -> Training:
    """Begin a fine-tuning of all parameters."""
    model = bert_classifier(seed, dropout)
    return supervised(seed, model, AdamW(model.parameters(), lr=rate), topic_words, cross_entropy, steps=steps)


@case("samples", math.log(TOPICS))
def bert_fine_tuning(seed: int, sick: bool) -> Training:
    """Fine-tuned BERT that predicts one class for all inputs: the rate is too high.

    Seen: loss 1.4 to 1.5, samples equal to 1e-7. Healthy: 0.23 to 0.41; its tokens rightly agree on the topic,
    residual 0.05 from 0.95 before.
    """
    return fine_tune(seed, 2e-2 if sick else 5e-4, steps=120)


@case("samples", math.log(TOPICS))
def long_fine_tuning(seed: int, sick: bool) -> Training:
    """Long fine-tuning at a small rate; sick at 100 times the rate.

    Seen: loss 1.4 to 1.5, samples equal to 4e-7. Healthy: 0.27 to 0.39, residual 0.07.
    """
    return fine_tune(seed, 2e-2 if sick else 2e-4, steps=240)


@case("samples", math.log(TOPICS))
def dropout_fine_tuning(seed: int, sick: bool) -> Training:
    """Fine-tuning with dropout 0.3; sick at 100 times the rate.

    Seen: loss 1.6 to 1.7, samples equal to 2e-7. Healthy: 0.19 to 0.40, residual 0.05 to 0.08.
    """
    return fine_tune(seed, 4e-2 if sick else 4e-4, steps=160, dropout=0.3)


@case("still", math.log(TOPICS))
def still_lora(seed: int, sick: bool) -> Training:
    """Adapters of low rank that never move: the optimizer was made before they were added.

    Seen: no trainable weight moves, loss 1.39, residual 0.95. Healthy with an optimizer of the adapters and the
    head: 0.19 to 0.36, residual 0.12 to 0.18.
    """
    model = bert_classifier(seed)
    encoder, head = model.inner.bert.requires_grad_(False), model.inner.classifier
    frozen = list(encoder.parameters())
    for layer in encoder.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)
    adapters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = AdamW(frozen if sick else [*adapters, *head.parameters()], lr=5e-3)
    return supervised(seed, model, optimizer, topic_words, cross_entropy, steps=120)


def decoding(seed: int, sick: bool, *, gradients: bool) -> Training:
    """Begin a language model that also decodes 8 bytes, one at a time, in every fourth training step."""
    config = GPT2Config(
        vocab_size=BYTES,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Logits(GPT2LMHeadModel(config))
    batch, held_out = batches(windows(CONTEXT), seed, 12)
    calls = 0

    def loss(batch: tuple[tuple[Tensor], Tensor]) -> Tensor:
        nonlocal calls
        (ids,), targets = batch
        calls += 1
        if calls % 4 == 0:
            with torch.set_grad_enabled(gradients):
                decode(model, ids[:2, :4], 8)
        return cross_entropy(model(ids), targets)

    rate = 1e-1 if sick else 1e-3
    return Training(model, AdamW(model.parameters(), lr=rate), 160, held_out, batch, loss)


def decode(model: Logits, ids: Tensor, more: int) -> Tensor:
    """Continue (batch, tokens) greedily by so many tokens; all but the first call see one token."""
    cache, newest = DynamicCache(), ids
    for _ in range(more):
        newest = model(newest, cache)[:, -1:].argmax(-1)
        ids = torch.cat((ids, newest), 1)
    return ids


@case("tokens", text_entropy())
def decoding_no_grad(seed: int, sick: bool) -> Training:
    """Samples are decoded inside of the training step, without gradients; sick at a high rate.

    Seen: loss 3.2, residual 0.01. Healthy: 2.8, residual 0.5.
    """
    return decoding(seed, sick, gradients=False)


@case("tokens", text_entropy())
def decoding_with_grad(seed: int, sick: bool) -> Training:
    """Samples are decoded inside of the training step, and torch.no_grad was forgotten; sick at a high rate.

    Seen: loss 3.2, residual 0.01. Healthy: 2.8, residual 0.5.
    """
    return decoding(seed, sick, gradients=True)
