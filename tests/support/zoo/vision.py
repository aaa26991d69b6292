"""Transformers that see: class tokens, talking heads, parallel branches, object queries, conditioning, two streams."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrangements import pixels_16
from .example import BATCH, HEADS, HIDDEN, Example, ExpectedBlock, Inputs, blocks_of, floats, seeded

Operators = dict[str, dict[str, Tensor]]
WIDTH = 48


def split(x: Tensor) -> Tensor:
    """``(batch, tokens, width)`` to ``(batch, heads, tokens, width of a head)``."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """The other way round."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all to all, on ``(batch, tokens, width)``."""
    return merge(F.scaled_dot_product_attention(split(q), split(k), split(v)))


def perceptron() -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.GELU(), nn.Linear(WIDTH, HIDDEN))


def product(*matrices: Tensor) -> Tensor:
    """The product of matrices and of gains."""
    result, *others = (
        matrix.detach().flatten(1) if matrix.dim() > 1 else matrix.detach().diag() for matrix in matrices
    )
    for matrix in others:
        result = result @ matrix
    return result


class Patches(nn.Module):
    """Pictures to 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, HIDDEN, 4, stride=4)

    def forward(self, pixels: Tensor) -> Tensor:
        """Cut and flatten."""
        return self.cut(pixels).flatten(2).transpose(1, 2)


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed before and behind the softmax; looks beside the stream too."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.before, self.behind = (nn.Parameter(torch.eye(HEADS)) for _ in range(2))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Attend to itself and to what is beside."""
        k, v = map(split, self.to_kv(torch.cat([x, *beside], 1)).chunk(2, -1))
        scores = split(self.to_q(x)) @ k.mT / 3
        pattern = torch.einsum("bhij,hg->bgij", scores, self.before).softmax(-1)
        return self.out(merge(torch.einsum("bhij,hg->bgij", pattern, self.behind) @ v))

    def matrix(self) -> Tensor:
        """W_o · W_v."""
        return product(self.out.weight, self.to_kv.weight[HIDDEN:])


class ScaledBranch(nn.Module):
    """A norm in front, a gain behind."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(HIDDEN), fn
        self.gain = nn.Parameter(torch.full((HIDDEN,), 0.7))

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Norm, branch, gain."""
        return self.fn(self.norm(x), *beside) * self.gain

    def operator(self, matrix: Tensor) -> Tensor:
        """The gain, the matrix, the gain of the norm."""
        return product(self.gain, matrix, self.norm.weight)


class CaiTLayer(nn.Module):
    """Talking heads and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = ScaledBranch(TalkingHeads()), ScaledBranch(perceptron())

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Add both."""
        x = x + self.attention(x, *beside)
        return x + self.mlp(x)


class CaiT(nn.Module):
    """Patches among themselves; then a class token alone, which attends to itself and to the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = Patches(), nn.Parameter(torch.zeros(1, 1, HIDDEN))
        self.layers = nn.ModuleList(CaiTLayer() for _ in range(2))
        self.class_layers = nn.ModuleList(CaiTLayer() for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        """The class token."""
        x = self.patches(pixels)
        for layer in self.layers:
            x = layer(x)
        token = self.token.expand(len(x), -1, -1)
        for layer in self.class_layers:
            token = layer(token, x)
        return token


def cait_operators(model: nn.Module) -> Operators:
    """All gains count; what mixes heads is part of the pattern."""
    return {
        f"{stage}.{i}": {
            "attention": layer.attention.operator(layer.attention.fn.matrix()),
            "mlp": layer.mlp.operator(product(layer.mlp.fn[2].weight, layer.mlp.fn[0].weight)),
        }
        for stage in ("layers", "class_layers")
        for i, layer in enumerate(getattr(model, stage))
    }


class SelfAttention(nn.Module):
    """Norm and self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        return self.out(attend(*self.qkv(self.norm(x)).chunk(3, -1)))

    def operator(self) -> Tensor:
        """W_o · W_v · gain."""
        return product(self.out.weight, self.qkv.weight[2 * HIDDEN :], self.norm.weight)


class NormedMLP(nn.Sequential):
    """Norm and MLP."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(HIDDEN), *perceptron())

    def operator(self) -> Tensor:
        """W_down · W_up · gain."""
        return product(self[3].weight, self[1].weight, self[0].weight)


class ParallelLayer(nn.Module):
    """Two attentions side by side, then two MLPs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(SelfAttention() for _ in range(2))
        self.mlps = nn.ModuleList(NormedMLP() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Add four branches."""
        x = x + sum(attention(x) for attention in self.attentions)
        return x + sum(mlp(x) for mlp in self.mlps)


def added(branches: Iterable[nn.Module]) -> Tensor:
    """The sum of the operators of some branches."""
    return torch.stack([branch.operator() for branch in branches]).sum(0)


def parallel_operators(model: nn.Module) -> Operators:
    """Operators of a kind are added up."""
    return {f"{i}": {"attention": added(m.attentions), "mlp": added(m.mlps)} for i, m in enumerate(model[1:], 1)}


class MapNorm(nn.Module):
    """LayerNorm over the channels of feature maps, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = (nn.Parameter(torch.full((1, HIDDEN, 1, 1), value)) for value in (1.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Centre and divide."""
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * self.gain + self.shift


class MapAttention(nn.Module):
    """Attention within windows or on a grid of feature maps, with convolutions of kernel 1."""

    def __init__(self, grid: bool) -> None:
        super().__init__()
        self.grid, self.norm = grid, MapNorm()
        self.qkv, self.out = nn.Conv2d(HIDDEN, 3 * HIDDEN, 1, bias=False), nn.Conv2d(HIDDEN, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, 4, 4)``: four windows of four positions."""
        order = (0, 3, 5, 2, 4, 1) if self.grid else (0, 2, 4, 3, 5, 1)
        back = [order.index(place) for place in range(6)]
        cut = self.qkv(self.norm(x)).unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(order)
        y = attend(*cut.flatten(3, 4).flatten(0, 2).chunk(3, -1))
        return self.out(y.view(*cut.shape[:5], HIDDEN).permute(back).flatten(4).flatten(2, 3))

    def operator(self) -> Tensor:
        """W_o · W_v · gain."""
        return product(self.out.weight, self.qkv.weight[2 * HIDDEN :], self.norm.gain.flatten())


class MapMLP(nn.Sequential):
    """An MLP on feature maps."""

    def __init__(self) -> None:
        super().__init__(MapNorm(), nn.Conv2d(HIDDEN, WIDTH, 1), nn.GELU(), nn.Conv2d(WIDTH, HIDDEN, 1))

    def operator(self) -> Tensor:
        """W_down · W_up · gain."""
        return product(self[3].weight, self[1].weight, self[0].gain.flatten())


class MaxViTLayer(nn.Module):
    """Windows, MLP, grid, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.mlp1, self.grid, self.mlp2 = MapAttention(False), MapMLP(), MapAttention(True), MapMLP()

    def forward(self, x: Tensor) -> Tensor:
        """Add four branches, one after the other."""
        for branch in (self.window, self.mlp1, self.grid, self.mlp2):
            x = x + branch(x)
        return x


def maxvit_operators(model: nn.Module) -> Operators:
    """Operators of a kind are added up."""
    return {
        f"{i}": {"attention": added([m.window, m.grid]), "mlp": added([m.mlp1, m.mlp2])}
        for i, m in enumerate(model[1:], 1)
    }


class Projections(nn.Module):
    """Attention of one sequence to another one, with four projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        return self.o(attend(self.q(q), self.k(k), self.v(v)))


class DetrLayer(nn.Module):
    """Post-norm; positions are added to queries and keys, and never to values."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.own, self.cross, self.mlp = Projections(), Projections() if cross else None, perceptron()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))

    def forward(self, x: Tensor, place: Tensor, memory: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Two branches or three."""
        x = self.norms[0](x + self.own(x + place, x + place, x))
        if self.cross is not None and memory is not None:
            x = self.norms[1](x + self.cross(x + place, memory + where, memory))
        return self.norms[2](x + self.mlp(x))


class Detr(nn.Module):
    """An encoder of patches, and object queries that begin at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.where, self.queries = nn.Parameter(torch.zeros(16, HIDDEN)), nn.Parameter(torch.zeros(5, HIDDEN))
        self.encoder = nn.ModuleList(DetrLayer(cross=False) for _ in range(2))
        self.decoder = nn.ModuleList(DetrLayer(cross=True) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        """The queries, when they have looked."""
        x = self.patches(pixels)
        where, queries = (code.expand(len(x), -1, -1) for code in (self.where, self.queries))
        for layer in self.encoder:
            x = layer(x, where)
        y = torch.zeros_like(queries)
        for layer in self.decoder:
            y = layer(y, queries, x, where)
        return y


def detr_operators(model: nn.Module) -> Operators:
    """No norm stands in front of a branch."""
    return {
        f"{stack}.{i}": {
            "attention": product(layer.own.o.weight, layer.own.v.weight),
            "mlp": product(layer.mlp[2].weight, layer.mlp[0].weight),
        }
        for stack in ("encoder", "decoder")
        for i, layer in enumerate(getattr(model, stack))
    }


class ResamplerLayer(nn.Module):
    """Latents attend to media and to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_media, self.norm, self.attention, self.mlp = (
            nn.LayerNorm(HIDDEN),
            nn.LayerNorm(HIDDEN),
            Projections(),
            NormedMLP(),
        )

    def forward(self, x: Tensor, media: Tensor) -> Tensor:
        """Two branches."""
        y = self.norm(x)
        both = torch.cat([self.norm_media(media), y], 1)
        x = x + self.attention(y, both, both)
        return x + self.mlp(x)


class Resampler(nn.Module):
    """A stream of latents, which are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.latents = Patches(), nn.Parameter(torch.zeros(5, HIDDEN))
        self.layers = nn.ModuleList(ResamplerLayer() for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        """Latents that have looked."""
        media = self.patches(pixels)
        x = self.latents.expand(len(media), -1, -1)
        for layer in self.layers:
            x = layer(x, media)
        return x


def resampler_operators(model: nn.Module) -> Operators:
    """The norm of the latents counts, that of the media does not."""
    return {
        f"layers.{i}": {
            "attention": product(layer.attention.o.weight, layer.attention.v.weight, layer.norm.weight),
            "mlp": layer.mlp.operator(),
        }
        for i, layer in enumerate(model.layers)
    }


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x, (HIDDEN,))


class Modulation(nn.Module):
    """Shifts, scales and gates from a conditioning vector, all zero at the start of training."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.map = count, nn.Linear(HIDDEN, count * HIDDEN)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """``count`` vectors."""
        return self.map(F.silu(c))[:, None].chunk(self.count, -1)


class DiTBlock(nn.Module):
    """Both branches are shifted, scaled and gated by the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = Modulation(6)
        self.qkv, self.out, self.mlp = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), perceptron()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Two gated branches."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)
        y = plain_norm(x) * (1 + scale) + shift
        x = x + gate * self.out(attend(*self.qkv(y).chunk(3, -1)))
        return x + gate_mlp * self.mlp(plain_norm(x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    """Patches, conditioned on a time."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = Patches(), nn.Linear(1, HIDDEN)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))

    def forward(self, pixels: Tensor, time: Tensor) -> Tensor:
        """Patches that know the time."""
        x, c = self.patches(pixels), self.time(time[:, None])
        for block in self.blocks:
            x = block(x, c)
        return x


def dit_operators(model: nn.Module) -> Operators:
    """What the conditioning makes is left out."""
    return {
        f"blocks.{i}": {
            "attention": product(block.out.weight, block.qkv.weight[2 * HIDDEN :]),
            "mlp": product(block.mlp[2].weight, block.mlp[0].weight),
        }
        for i, block in enumerate(model.blocks)
    }


class JointBlock(nn.Module):
    """Text and picture have weights of their own, and attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.ModuleDict({name: Modulation(6) for name in ("text", "image")})
        self.qkv = nn.ModuleDict({name: nn.Linear(HIDDEN, 3 * HIDDEN) for name in ("text", "image")})
        self.out = nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN) for name in ("text", "image")})
        self.mlp = nn.ModuleDict({name: perceptron() for name in ("text", "image")})

    def forward(self, streams: dict[str, Tensor], c: Tensor) -> dict[str, Tensor]:
        """Two branches for each of two streams."""
        modulations = {name: self.modulation[name](c) for name in streams}
        inputs = []
        for name, x in streams.items():
            shift, scale, *_ = modulations[name]
            inputs.append(self.qkv[name](plain_norm(x) * (1 + scale) + shift))
        y = attend(*torch.cat(inputs, 1).chunk(3, -1))
        result = {}
        for (name, x), part in zip(streams.items(), y.split([x.shape[1] for x in streams.values()], 1), strict=True):
            *_, gate, shift, scale, gate_mlp = modulations[name]
            x = x + gate * self.out[name](part)
            result[name] = x + gate_mlp * self.mlp[name](plain_norm(x) * (1 + scale) + shift)
        return result


class MMDiT(nn.Module):
    """Blocks with two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.time = Patches(), nn.Linear(6, HIDDEN), nn.Linear(1, HIDDEN)
        self.joint = nn.ModuleList(JointBlock() for _ in range(2))

    def forward(self, pixels: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """The tokens of both."""
        streams, c = {"text": self.text(text), "image": self.image(pixels)}, self.time(time[:, None])
        for block in self.joint:
            streams = block(streams, c)
        return torch.cat([streams["text"], streams["image"]], 1)


def mmdit_operators(model: nn.Module) -> Operators:
    """Each stream has its own."""
    return {
        f"joint.{i}.out.{name} + joint.{i}.mlp.{name}": {
            "attention": product(block.out[name].weight, block.qkv[name].weight[2 * HIDDEN :]),
            "mlp": product(block.mlp[name][2].weight, block.mlp[name][0].weight),
        }
        for i, block in enumerate(model.joint)
        for name in ("text", "image")
    }


def _mmdit_blocks() -> tuple[ExpectedBlock, ...]:
    return tuple(
        ExpectedBlock(
            f"joint.{i}.out.{name} + joint.{i}.mlp.{name}",
            (f"joint.{i}.out.{name}",),
            (f"joint.{i}.mlp.{name}", f"joint.{i}.mlp.{name}.2"),
            whole=False,
        )
        for i in range(2)
        for name in ("text", "image")
    )


class SingleBlock(nn.Module):
    """Attention and an MLP between two matrices that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = Modulation(3)
        self.into, self.out = nn.Linear(HIDDEN, 3 * HIDDEN + WIDTH), nn.Linear(HIDDEN + WIDTH, HIDDEN)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """One gated branch."""
        shift, scale, gate = self.modulation(c)
        qkv, up = self.into(plain_norm(x) * (1 + scale) + shift).split([3 * HIDDEN, WIDTH], -1)
        return x + gate * self.out(torch.cat([attend(*qkv.chunk(3, -1)), F.gelu(up, approximate="tanh")], -1))

    def operators(self) -> dict[str, Tensor]:
        """Of the matrices that they share, each kind has its rows and columns."""
        return {
            "attention": product(self.out.weight[:, :HIDDEN], self.into.weight[2 * HIDDEN : 3 * HIDDEN]),
            "mlp": product(self.out.weight[:, HIDDEN:], self.into.weight[3 * HIDDEN :]),
        }


class SingleStream(nn.Module):
    """Such blocks on patches; no member of the zoo, because two branches of a block have one site."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = Patches(), nn.Linear(1, HIDDEN)
        self.blocks = nn.ModuleList(SingleBlock() for _ in range(2))

    def forward(self, pixels: Tensor, time: Tensor) -> Tensor:
        """Patches that know the time."""
        x, c = self.patches(pixels), self.time(time[:, None])
        for block in self.blocks:
            x = block(x, c)
        return x


def timed(model: nn.Module) -> Inputs:
    """Pictures and times."""
    return (floats(BATCH, 3, 16, 16), floats(BATCH, seed=1)), {}


def captioned(model: nn.Module) -> Inputs:
    """Pictures, captions and times."""
    return (floats(BATCH, 3, 16, 16), floats(BATCH, 7, 6, seed=1), floats(BATCH, seed=2)), {}


def members() -> list[Example]:
    """Every model of this module."""
    scaled = ("attention", "attention.fn", "attention.fn.out"), ("mlp", "mlp.fn", "mlp.fn.2")
    pair = ("own", "own.o"), ("mlp", "mlp.2")
    return [
        Example(
            "vit_cait",
            seeded(CaiT),
            pixels_16,
            tuple(block for stack in ("layers", "class_layers") for block in blocks_of(stack, range(2), *scaled)),
            operators=cait_operators,
            note="talking heads, LayerScale; a class token that is a stream of its own",
        ),
        Example(
            "vit_parallel",
            seeded(lambda: nn.Sequential(Patches(), ParallelLayer(), ParallelLayer())),
            pixels_16,
            blocks_of(
                "",
                range(1, 3),
                ("attentions.0", "attentions.0.out"),
                ("mlps.0", "mlps.0.3"),
                (("attentions.1", "attentions.1.out"), ("mlps.1", "mlps.1.3")),
                other_kinds=("attention", "mlp"),
            ),
            norm_scheme="par",
            operators=parallel_operators,
            note="two attentions and two MLPs are added up",
        ),
        Example(
            "vit_maxvit",
            seeded(lambda: nn.Sequential(Patches().cut, MaxViTLayer(), MaxViTLayer())),
            pixels_16,
            blocks_of(
                "",
                range(1, 3),
                ("window", "window.out"),
                ("mlp1", "mlp1.3"),
                (("grid", "grid.out"), ("mlp2", "mlp2.3")),
                other_kinds=("attention", "mlp"),
            ),
            operators=maxvit_operators,
            note="windows and a grid of feature maps, norms over their channels written out",
        ),
        Example(
            "detr",
            seeded(Detr),
            pixels_16,
            blocks_of("encoder", range(2), *pair)
            + blocks_of("decoder", range(2), *pair, (("cross", "cross.o"),), other_kinds=("cross_attention",)),
            norm_scheme="post",
            identity=False,
            operators=detr_operators,
            note="object queries begin at zero, and positions are parameters: the first attention sees no data",
        ),
        Example(
            "perceiver_resampler",
            seeded(Resampler),
            pixels_16,
            blocks_of("layers", range(2), ("attention", "attention.o"), ("mlp", "mlp.3")),
            operators=resampler_operators,
            note="latents are parameters; they attend to media and to themselves in one row",
        ),
        Example(
            "dit",
            seeded(DiT),
            timed,
            blocks_of("blocks", range(2), "out", ("mlp", "mlp.2")),
            operators=dit_operators,
            note="adaLN-zero: shifted, scaled and gated by a conditioning vector",
        ),
        Example(
            "mmdit",
            seeded(MMDiT),
            captioned,
            _mmdit_blocks(),
            operators=mmdit_operators,
            note="text and picture are two streams, each with branches of its own, that attend to each other",
        ),
    ]
