"""Example inputs: every kind of guess, and the message where none fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from found import Search
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from zoo import example, examples

from lightning_spectral import find_blocks, measure
from lightning_spectral.errors import ExampleInputError

WIDTH = 16
# No guess fits: spectrograms, one picture size and no attribute that says which, a cache that does not fit, pictures
# beside times and captions.
UNGUESSABLE = ("whisper", "mlp_mixer", "xlstm", "refused_recurrent", "dit", "mmdit", "whisper_openai", "retro_chunked")
# One of each kind of guess and of each wrapper; the Llama-like ones are all guessed alike.
GUESSED = [
    member.name
    for member in examples()
    if (not member.survey or member.name in ("llama", "t5", "bart", "vit", "torch_encoder_post", "clip_text"))
    and member.name not in (*UNGUESSABLE, "pyramid")  # large pictures fit the pyramid, slowly
    and not member.name.startswith(("qkv_", "experts_", "plain_", "refused_"))
]


class Block(nn.Module):
    """A pre-norm block of one head, on (batch, tokens, width)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Model(nn.Module):
    """Two blocks behind anything; subclasses say what they take."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def stack(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


NAMES = ["layers.0", "layers.1"]


def names(model: nn.Module, batch: Any = None) -> list[str]:
    blocks = find_blocks(model, batch=batch)
    assert all(block.verified for block in blocks)
    return [block.name for block in blocks]


class Tokens(Model):
    """Token ids; more positions than tokens."""

    def __init__(self, vocabulary: int = 7, positions: int = 64) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(positions, WIDTH)

    def forward(self, idx: Tensor) -> Tensor:
        return self.stack(self.embed(idx) + self.positions(torch.arange(idx.shape[1])))


class TwoSequences(Tokens):
    """Two required arguments of token ids."""

    def forward(self, source: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
        return torch.cat([super().forward(source), scale * super().forward(target)], dim=1)


class Floats(Model):
    """Vectors of the width of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


class Features(Model):
    """Vectors of another width than the stream."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers
        self.project = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, features: Tensor) -> Tensor:
        return self.stack(self.project(features))


class Pictures(Model):
    """Pictures; the position embedding dictates their size."""

    def __init__(self, channels: int, size: int, attribute: str | None = None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, WIDTH, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros((size // 4) ** 2, WIDTH))
        if attribute is not None:
            setattr(self, attribute, size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.stack(self.patches(pixels).flatten(2).mT + self.positions)


class Configured(Tokens):
    """The conventions of models that carry a ``config``."""

    def __init__(self, main: str, **config: Any) -> None:
        super().__init__()
        self.main_input_name = main
        self.config = SimpleNamespace(**config)
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        if pixel_values is not None:
            assert pixel_values.shape[-2:] == (8, 12)
            return self.stack(self.patches(pixel_values).flatten(2).mT)
        if input_ids is None:
            raise ValueError("You must give input_ids")
        if getattr(self.config, "is_encoder_decoder", False):
            assert decoder_input_ids is not None
            return torch.cat([super().forward(input_ids), super().forward(decoder_input_ids)], dim=1)
        return super().forward(input_ids)


@pytest.mark.parametrize(
    "model",
    [
        Tokens(),
        Tokens(vocabulary=1000, positions=64),
        Tokens(vocabulary=2),
        TwoSequences(),
        Floats(),
        Features(),
        Pictures(3, 32),
        Pictures(1, 16),
        Pictures(3, 20, "image_size"),
        Pictures(2, 24, "img_size"),
        Configured("input_ids", vocab_size=7),
        Configured("input_ids", vocab_size=7, is_encoder_decoder=True),
        Configured("input_ids", text_config=SimpleNamespace(vocab_size=7)),
        Configured("pixel_values", image_size=(8, 12)),
        Floats().half(),
        Floats().double(),
        Features().bfloat16(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_inputs_are_guessed(model: nn.Module) -> None:
    """Ids below every embedding, vectors, pictures, the words of a config, in the dtype of the weights."""
    assert names(model) == NAMES


@pytest.mark.parametrize("name", GUESSED)
def test_a_guess_finds_what_the_example_finds(name: str, found: Search) -> None:
    """Without an example input, the blocks of the zoo are the same."""
    assert find_blocks(example(name).build()) == found(name).blocks


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (torch.ones(2, 5, WIDTH), "tensor"),
        ((torch.ones(2, 5, WIDTH), torch.ones(2, 5, WIDTH)), "tuple"),
        ({"x": torch.ones(2, 5, WIDTH), "y": torch.ones(2, 5, WIDTH)}, "dict"),
    ],
)
def test_the_example_input_of_a_lightning_module_is_used(given: Any, form: str) -> None:
    """A tensor, positional arguments or keyword arguments, as in Lightning; the guesses would not fit."""

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Floats()
            self.example_input_array = given

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            assert x.shape == (2, 5, WIDTH)
            assert (y is None) == (form == "tensor")
            return self.model(x)

    assert names(Lit()) == [f"model.{name}" for name in NAMES]


def test_a_wrapper_without_forward_is_looked_into() -> None:
    """Only the inner model can run, with guessed and with given inputs; the names start at the wrapper."""

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Tokens()

    expected = [f"model.{name}" for name in NAMES]
    assert names(Lit()) == expected
    assert names(Lit(), torch.zeros(2, 5, dtype=torch.long)) == expected


def test_a_part_of_a_model_is_not_taken_for_the_model() -> None:
    """Where only one of two halves could be run, nothing is reported: the other half would be missing in silence."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Floats(), Tokens()

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            features, idx = pair
            return self.encoder(features).mean() + self.decoder(idx)

    with pytest.raises(ExampleInputError, match=r"Halves could not be run on any guessed input"):
        find_blocks(Halves())
    pair = torch.ones(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.long)
    assert names(Halves(), (pair,)) == [f"{half}.{name}" for half in ("encoder", "decoder") for name in NAMES]


class Picky(Floats):
    """Takes two arguments of different kinds, and says so in two lines."""

    def forward(self, idx: Tensor, *, mask: Tensor) -> Tensor:
        raise TypeError("needs a mask\nand more")


def test_where_no_guess_fits_the_error_lists_the_attempts_and_asks_for_one() -> None:
    """Every attempt with its module, its shape and its first line of complaint."""
    with pytest.raises(ExampleInputError, match=r"Picky could not be run on any guessed input") as caught:
        find_blocks(Picky())
    message = str(caught.value)
    assert "Pass an example, batch=example_input (to a monitor: blocks=find_blocks(model, batch=" in message
    assert "example_input_array" in message
    assert f"Picky on 1 argument(s) of floats of shape (2, 13, {WIDTH}): TypeError: " in message
    assert "and more" not in message


def test_every_attempt_is_listed() -> None:
    """Token ids below each embedding, then vectors."""

    class Never(Tokens):
        def forward(self, idx: Tensor) -> Tensor:
            raise RuntimeError("never")

    with pytest.raises(ExampleInputError, match="Never could not be run") as caught:
        find_blocks(Never())
    attempts = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert attempts[0].startswith("Never on 1 argument(s) of token ids below 64, shape (2, 13): RuntimeError: never")
    assert attempts[1].startswith("Never on 1 argument(s) of token ids below 7")
    assert any("floats of shape (2, 13, 16)" in attempt for attempt in attempts)


def test_a_model_without_any_sign_of_what_it_takes_says_so() -> None:
    """No parameters at all."""
    with pytest.raises(ExampleInputError, match="the model gives no sign of what it takes"):
        find_blocks(nn.Identity())


@pytest.mark.parametrize("name", UNGUESSABLE)
def test_models_that_cannot_be_guessed_ask_for_an_example(name: str) -> None:
    """Never a part of the model, never another refusal."""
    with pytest.raises(ExampleInputError, match="Pass an example"):
        find_blocks(example(name).build())


def test_given_input_that_fails_is_reported_with_its_error() -> None:
    """No guess is tried instead."""
    with pytest.raises(ExampleInputError, match=r"cannot be run on the given example input: RuntimeError: .*shape"):
        find_blocks(Floats(), batch=torch.ones(2, 5, WIDTH + 1))
    with pytest.raises(ExampleInputError, match=r"given example input: TypeError: .*unexpected keyword argument 'ids'"):
        find_blocks(Floats(), batch={"ids": torch.ones(2, 5, WIDTH)})
    with pytest.raises(ExampleInputError, match=r"not list\. A list is one argument: .* batch=batch\[0\]"):
        find_blocks(Floats(), batch=[torch.ones(2, 5, WIDTH), torch.ones(2)])


def test_given_input_may_be_positional_or_by_name() -> None:
    """As in a call of the model."""
    x = torch.ones(2, 5, WIDTH)
    assert names(Floats(), x) == names(Floats(), {"x": x}) == NAMES
    model, ids = TwoSequences(), torch.zeros(2, 5, dtype=torch.long)
    assert names(model, (ids, ids)) == names(model, {"source": ids, "target": ids, "scale": 0.5}) == NAMES


def test_measure_takes_a_batch_in_each_form() -> None:
    """A tensor, a tuple of positional arguments, a dict of keyword arguments."""
    model, ids = TwoSequences(), torch.zeros(2, 5, dtype=torch.long)
    expected = measure(model).layers
    assert measure(model, batch=(ids, ids)).layers == expected
    assert measure(model, batch={"source": ids, "target": ids}).layers == expected
    assert measure(Tokens(), batch=ids).layers[0].name == "layers.0"
    with pytest.raises(ExampleInputError, match="cannot be run on the given example input"):
        measure(model, batch=ids)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    """As a batch. Those that an encoder of torch makes of a padded one come only on its fast path, which is off."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(requires_grad=False)
    ragged = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(3, 16)], layout=layout)
    with pytest.raises(ExampleInputError, match=r"nested tensors, which cannot be traced\. Pass a padded batch"):
        find_blocks(encoder, batch=ragged)
    padded, mask = ragged.to_padded_tensor(0.0), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert [block.verified for block in find_blocks(encoder, batch={"src": padded, "src_key_padding_mask": mask})] == [
        True,
        True,
    ]
