"""A recorded pass, run again from the middle on other content, is the model run on that content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import Example, example, examples

from lightning_spectral.discovery.trace.recorder import record
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.tape import Tape

RUNNING = [member.name for member in examples() if member.callable and len(member.blocks) > 1 and not member.compiled]

Step = tuple[str, int, int]


def recorded(model: nn.Module, *inputs: Any, **named: Any) -> Tape:
    return record(model, lambda: model(*inputs, **named), (inputs, named))


def output_of(tape: Tape, path: str) -> int:
    """The value that the first call of a module returned."""
    call = next(call for call in tape.calls if call.path == path)
    return call.outputs[0][1]


def first_tensor(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if hasattr(value, "values") else value[0]
    return value


def neighbours(member: Example) -> tuple[str, str] | None:
    """Two blocks of one stack, each called once, one behind the other."""
    stacks = [(block.name.rpartition(".")[0], block) for block in member.blocks if block.calls == 1]
    for (stack, first), (other, second) in pairwise(stacks):
        if stack == other:
            return first.name, second.name
    return None


UNCALLED = {"pairs_in_the_parent", "pre_norm_wrappers"}  # their blocks are containers, which nobody calls
PAIRED = [name for name in RUNNING if neighbours(example(name)) and name not in UNCALLED]


@pytest.mark.zoo
@pytest.mark.parametrize("name", PAIRED)
def test_a_block_replayed_on_changed_content_is_the_block_run_on_it(name: str) -> None:
    """In float64, to the rounding of the float32 module; and on the recorded content it gives what was recorded."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    pair = neighbours(member)
    assert pair is not None
    tape = recorded(model, *args, **kwargs)
    before, after = (output_of(tape, path) for path in pair)
    content = tape.tensors[before].double()
    tolerance = 1e-4 * max(1.0, float(content.abs().max()))
    same = replay(tape, {before: content}, after)
    torch.testing.assert_close(same, tape.tensors[after].double(), atol=tolerance, rtol=0)

    noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = content + 1e-3 * noise

    def put(module: nn.Module, arguments: Any, output: Any) -> Any:
        new = changed.to(first_tensor(output).dtype)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    seen: list[Tensor] = []
    with (
        model.get_submodule(pair[0]).register_forward_hook(put),
        model.get_submodule(pair[1]).register_forward_hook(lambda *call: seen.append(first_tensor(call[2]))),
        torch.no_grad(),
    ):
        model(*args, **kwargs)
    replayed = replay(tape, {before: changed}, after)
    assert float((replayed - tape.tensors[after]).abs().max()) > 1e-4
    torch.testing.assert_close(replayed, seen[0].double(), atol=tolerance, rtol=0)


class Program(nn.Module):
    """Runs a list of steps on tensors that are views of each other."""

    VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x[: max(1, len(x) // 2)],
        lambda x: x[1:],
        lambda x: x[..., ::2],
        lambda x: x.transpose(0, -1),
        lambda x: x.chunk(2)[-1],
        lambda x: x.unsqueeze(0)[0],
        lambda x: x.detach(),
        lambda x: x.view_as(x),
    )
    WRITES: tuple[Callable[[Tensor, Tensor], object], ...] = (
        lambda x, c: x.add_(c),
        lambda x, c: x.mul_(1 + c),
        lambda x, c: x.copy_(c.expand_as(x)),
        lambda x, c: x.index_put_((torch.tensor([0]),), c, accumulate=True),
        lambda x, c: x.index_add_(0, torch.tensor([0, 0]), c.expand(2, *x.shape[1:])),
        lambda x, c: x.masked_fill_(torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)) % 2 == 0, c),
        lambda x, c: torch.add(x, c, out=x),
        lambda x, c: torch.sin(x.clone(), out=x),
        lambda x, c: x.relu_(),
        lambda x, c: x.__setitem__(slice(0, 1), c),
        lambda x, c: x.zero_(),
    )

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.weight = nn.Parameter(torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        alive = [x, x @ self.weight.detach()]
        for what, number, choice in self.steps:
            chosen, other = alive[choice % len(alive)], alive[(choice * 7 + 1) % len(alive)]
            if what == "view":
                alive.append(self.VIEWS[number % len(self.VIEWS)](chosen))
            elif what == "write":
                self.WRITES[number % len(self.WRITES)](chosen, other.detach().mean() / 3)
            else:
                alive.append(torch.cos(chosen) * other.mean())
        return torch.stack([item.sum() for item in alive])


STEPS = st.lists(
    st.tuples(st.sampled_from(["view", "write", "make"]), st.integers(0, 50), st.integers(0, 50)), max_size=12
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 2**30))
def test_any_mixture_of_views_and_writes_is_replayed(steps: list[Step], seed: int) -> None:
    """Views of views, written through in every way, and read again: from the input of the program to its output."""
    program = Program(steps)
    first, second = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        tape = recorded(program, first.clone())
        expected = program(second.clone())
    torch.testing.assert_close(replay(tape, {0: second}, output_of(tape, "")), expected)


class Function(nn.Module):
    """A function of one tensor, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def falcon_add(x: Tensor) -> Tensor:
    """The other branch is added in place to what was captured before."""
    mlp = x * 2
    captured = mlp
    mlp += x.sin()
    return captured + mlp


def chunk_and_add(x: Tensor) -> Tensor:
    """Writes to one half of a tensor, then reads the whole."""
    y = x.clone()
    left, right = y.chunk(2, dim=-1)
    left.add_(right)
    right.mul_(left)
    return y


def collect(x: Tensor) -> Tensor:
    """Rows computed apart and collected into a buffer."""
    rows = torch.zeros_like(x)
    for start in range(2):
        index = torch.arange(start, x.shape[0], 2)
        rows.index_add_(0, index, x[index].exp())
    rows[1:3] = rows[1:3] + x[:2]
    return rows


def two_views(x: Tensor) -> Tensor:
    """Two views of one storage that overlap, one written, both read, twice."""
    y = x + 0
    upper, lower = y[:3], y[2:]
    upper *= 2
    lower -= upper.mean()
    upper += 1
    return torch.cat([upper, lower])


def preallocated(x: Tensor) -> Tensor:
    """Results go into slices of a tensor that was allocated before."""
    out = torch.empty(2, *x.shape, dtype=x.dtype)
    torch.mul(x, 3, out=out[0])
    torch.matmul(x, x.mT @ x, out=out[1])
    return out.sum(0)


def rotated(x: Tensor) -> Tensor:
    """Complex numbers that share the memory of real ones."""
    pairs = torch.view_as_complex((x + 0).view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones(3, dtype=x.dtype), x[0, :3])).flatten(-2)


@pytest.mark.parametrize(
    "function", [falcon_add, chunk_and_add, collect, two_views, preallocated, rotated], ids=lambda item: item.__name__
)
def test_in_place_idioms_are_replayed(function: Callable[[Tensor], Tensor]) -> None:
    """The ways in which real models write in place."""
    first, second = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tape = recorded(Function(function), first)
    result = output_of(tape, "")
    torch.testing.assert_close(replay(tape, {0: first}, result), function(first))
    torch.testing.assert_close(replay(tape, {0: second}, result), function(second))
    assert tape.depends(result, 0)


def test_values_are_what_they_were_when_they_were_read() -> None:
    """A value keeps its content although its tensor is overwritten later."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        z = y + 1
        y.zero_()
        return z + y

    x = torch.ones(3)
    tape = recorded(Function(function), x)
    contents = [tensor.tolist() for tensor in tape.tensors]
    assert [2.0] * 3 in contents
    assert [3.0] * 3 in contents
    assert contents.count([0.0] * 3) >= 1


def test_dependence_is_by_value_and_not_by_storage() -> None:
    """What was read before a write does not depend on it; what is read afterwards does."""

    def function(x: Tensor) -> Tensor:
        y = torch.zeros(3)
        before = y + 1
        y[:1].copy_(x[:1])
        return torch.stack([before, y + 1])

    tape = recorded(Function(function), torch.ones(3))
    names = {operation.name: [] for operation in tape.operations}
    for operation in tape.operations:
        names[operation.name].append(operation.outputs[0])
    before, after = names["add"]
    assert not tape.depends(before, 0)
    assert tape.depends(after, 0)
    assert not tape.is_data(before)
    assert tape.is_data(after)


def test_a_source_is_not_computed_again() -> None:
    """One operand of a product may be held while the other moves."""

    def function(x: Tensor) -> Tensor:
        return x.sin() * x.cos()

    x, other = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tape = recorded(Function(function), x)
    sine = next(operation.outputs[0] for operation in tape.operations if operation.name == "sin")
    held = replay(tape, {0: other, sine: tape.tensors[sine]}, output_of(tape, ""))
    torch.testing.assert_close(held, x.sin() * other.cos())


def test_parameters_are_known_by_name_and_shared_ones_by_their_first() -> None:
    """Also where the weight is read through a view."""
    member = example("nanogpt")
    model = member.build()
    tape = recorded(model, *member.inputs(model)[0])
    assert set(tape.names.values()) <= dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    assert "transformer.wte.weight" in tape.names.values()
    assert "lm_head.weight" not in tape.names.values()


def calls(tape: Tape) -> Iterator[tuple[str, str]]:
    for call in tape.calls:
        yield call.path, "" if call.parent < 0 else tape.calls[call.parent].path


def test_calls_know_their_parent() -> None:
    """The tree of calls is that of the modules."""
    member = example("nanogpt")
    model = member.build()
    for path, parent in calls(recorded(model, *member.inputs(model)[0])):
        assert not path or path.startswith(parent)
