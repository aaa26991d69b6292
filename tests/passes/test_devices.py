"""Devices: the default one, those without float64, and the random streams of those that this machine has not."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_run import TinyGPT
from torch import Tensor, nn
from torch.nn import functional

import lightning_spectral
from lightning_spectral import (
    ExactSVD,
    attach_scales,
    balance_init_,
    balance_penalty,
    find_blocks,
    fuse_scales,
    measure,
)
from lightning_spectral.analysis import lyapunov_exponents
from lightning_spectral.discovery.find import blocks_of
from lightning_spectral.discovery.trace.recorder import record
from lightning_spectral.discovery.trace.tape import probe_device
from lightning_spectral.passes.aside.streams import random_streams_kept

PACKAGE = Path(lightning_spectral.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace", "normal"),
    *(
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "tril_indices",
        "triu_indices",
        "zeros",
    ),
}
# The states of a metric are where torchmetrics puts them.
EXEMPT = {"metrics/streamed.py"}
IDS = torch.arange(16).view(2, 8)


def without_device(source: str) -> list[str]:
    """Return the calls of factories of tensors that leave the device to a default that anybody may have set."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"]
    wanted = [call for call in made if call.func.attr in FACTORIES]  # type: ignore[attr-defined]
    return [ast.unparse(call) for call in wanted if not {"device", None} & {word.arg for word in call.keywords}]


def test_every_tensor_that_is_made_says_where():
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if (calls := without_device(path.read_text(encoding="utf-8")))
    }
    assert {name: calls for name, calls in found.items() if name not in EXEMPT} == {}


def test_a_factory_without_a_device_is_seen():
    source = "torch.zeros(3, device=x.device) + torch.randn(3, generator=g) + torch.zeros_like(x) + x.new_zeros(3)"
    assert without_device(source) == ["torch.randn(3, generator=g)"]


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_a_default_device_elsewhere_changes_nothing():
    """The meta device stands for another one: what lands there by accident cannot be computed with."""
    torch.manual_seed(0)
    model = TinyGPT()
    blocks, expected = find_blocks(model, batch=IDS), measure(model, batch=IDS)
    jacobians = measure(model, blocks[:1], batch=IDS, linearization="jacobian")
    exponents = lyapunov_exponents(model, batch=IDS, blocks=blocks)
    with default_device("meta"):
        assert find_blocks(model, batch=IDS) == blocks
        assert [layer.ratio for layer in measure(model, batch=IDS)] == [layer.ratio for layer in expected]
        measured = measure(model, blocks[:1], batch=IDS, linearization="jacobian")
        assert [layer.ratio for layer in measured] == [layer.ratio for layer in jacobians]
        assert torch.equal(lyapunov_exponents(model, batch=IDS, blocks=blocks).exponents, exponents.exponents)
        for layer, known in zip(measure(model, blocks, solver=ExactSVD()), expected, strict=True):
            assert layer.ratio == pytest.approx(known.ratio, rel=0.02)
        assert balance_penalty(model, blocks).device.type == "cpu"
        attach_scales(model, blocks)
        fuse_scales(model)
        assert all(layer.ratio == pytest.approx(1.0, rel=1e-5) for layer in balance_init_(model, blocks))


class Stepped(nn.Module):
    """A block that makes tensors of its own where its input is, and attends in one fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        bias = -(places[:, None] - places).abs()
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_probes_of_a_pass_on_a_device_without_float64_run_on_the_cpu(name: str):
    """What such a machine would record, as far as this one can tell: its device among the arguments, its kernel."""
    torch.manual_seed(0)
    model, x = Stepped(), torch.randn(2, 5, 16)
    expected = find_blocks(model, batch=x)
    assert [block.verified for block in expected] == [True]
    tape = record(model, lambda: model(x), x)
    kernels = {
        "mps": "_scaled_dot_product_attention_math_for_mps",
        "xpu": "_scaled_dot_product_fused_attention_overrideable",
    }
    changed = 0
    for operation in tape.operations:
        if "device" in operation.kwargs:
            operation.kwargs["device"], changed = torch.device(name), changed + 1
        if operation.name.startswith("_scaled_dot_product"):
            operation.name, changed = kernels[name], changed + 1
            operation.function = getattr(torch.ops.aten, operation.name).default
            operation.args, operation.kwargs = operation.args[:4], {}
    assert changed >= 2
    assert list(blocks_of(tape, model)[0]) == list(expected)


def test_what_a_device_without_float64_holds_is_probed_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """The meta device has no numbers at all; content is taken from it as it would be from one without float64."""
    assert probe_device(torch.device("cpu")) == torch.device("cpu")
    assert probe_device(torch.device("mps")) == probe_device(torch.device("xpu")) == torch.device("cpu")
    model, x = Stepped(), torch.randn(2, 5, 16)
    tape = record(model, lambda: model(x), x)
    for value, tensor in enumerate(tape.tensors):
        wide = tape.wide(value)
        assert wide.device.type == "cpu"
        assert wide.dtype == (torch.float64 if tensor.is_floating_point() else tensor.dtype)


def test_random_streams_of_other_devices_are_put_back():
    """Of a device that is registered as torch's own are: its module reads and writes the state of one stream."""
    streams = {0: torch.arange(3), 1: torch.arange(3)}
    module = types.ModuleType("torch.privateuseone")
    module.get_rng_state = lambda device: streams[device.index].clone()  # type: ignore[attr-defined]
    module.set_rng_state = lambda state, device: streams[device.index].copy_(state)  # type: ignore[attr-defined]
    torch._register_device_module("privateuseone", module)
    try:
        with random_streams_kept([torch.device("privateuseone", 1), torch.device("meta"), torch.device("cpu")]):
            streams[0] += 1
            streams[1] += 1
        assert streams[0].tolist() == [1, 2, 3]
        assert streams[1].tolist() == [0, 1, 2]
    finally:
        delattr(torch, "privateuseone")
