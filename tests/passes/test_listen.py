"""What stands in front of modules hears every call of them, and is no part of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral.passes.listen import compiled_call, listen, stop_listening


class Notes:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[nn.Module, int, Any]] = []

    def __call__(
        self, module: nn.Module, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = call()
        self.heard.append((module, len(args) + len(kwargs), output))
        return output


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_it_hears_what_the_caller_gets_hooks_of_the_module_included():
    module, notes = nn.Identity(), Notes()
    module.register_forward_hook(doubled)
    (listener,) = listen([module], notes)
    assert torch.equal(module(torch.ones(2)), 2 * torch.ones(2))
    ((heard, arguments, output),) = notes.heard
    assert (heard, arguments) == (module, 1)
    assert torch.equal(output, 2 * torch.ones(2))
    assert len(module._forward_hooks) == 1
    stop_listening([listener])
    module(torch.ones(2))
    assert len(notes.heard) == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_stand_in_a_row_and_leave_in_any_order(order: tuple[int, ...]):
    module, notes = nn.Linear(2, 2), [Notes() for _ in range(3)]
    before = dict(vars(module))
    rows = [listen([module], note) for note in notes]
    for left, place in enumerate(order, start=1):
        stop_listening(rows[place])
        for note in notes:
            note.heard.clear()
        module(torch.ones(2))
        stopped = order[:left]
        assert [len(note.heard) for note in notes] == [int(number not in stopped) for number in range(3)]
    assert vars(module) == before


def test_what_is_raised_passes():
    module, notes = nn.Linear(2, 2), Notes()
    listeners = listen([module], notes)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.ones(1, 3))
    stop_listening(listeners)
    assert notes.heard == []


def test_copies_of_every_kind_are_bare_and_run_their_own_code():
    module, notes = nn.Linear(2, 2), Notes()
    listeners = listen([module], notes)
    shallow, replica = copy.copy(module), module._replicate_for_data_parallel()
    for other in (shallow, replica):
        other.forward = lambda x: x + 1
        assert torch.equal(other(torch.zeros(2)), torch.ones(2))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other(torch.zeros(2))
        assert vars(other).get("_compiled_call_impl") is None
    assert notes.heard == []
    stop_listening(listeners)


def test_code_that_was_compiled_in_place_still_runs_and_is_known():
    module, notes = nn.Linear(2, 2), Notes()
    calls: list[int] = []
    module._compiled_call_impl = lambda *args: calls.append(1) or module._call_impl(*args)
    compiled = module._compiled_call_impl
    listeners = listen([module], notes)
    assert compiled_call(module) is compiled
    module(torch.ones(2))
    assert (len(calls), len(notes.heard)) == (1, 1)
    stop_listening(listeners)
    assert module._compiled_call_impl is compiled


def test_a_module_that_is_compiled_meanwhile_keeps_its_code():
    module, notes = nn.Linear(2, 2), Notes()
    listeners = listen([module], notes)
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    stop_listening(listeners)
    assert module._compiled_call_impl is compiled
    module(torch.ones(2))
    assert notes.heard == []


@pytest.mark.filterwarnings("ignore:`torch.jit.(script|trace)` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated")
def test_a_traced_module_has_nothing_of_it():
    module, notes = nn.Linear(2, 2), Notes()
    listeners = listen([module, torch.jit.script(nn.Linear(2, 2))], notes)
    assert len(listeners) == 1
    traced = torch.jit.trace(module, torch.ones(1, 2), check_trace=False)
    assert torch.equal(traced(torch.ones(1, 2)), module(torch.ones(1, 2)))
    assert len(notes.heard) == 1  # the last call alone
    stop_listening(listeners)
