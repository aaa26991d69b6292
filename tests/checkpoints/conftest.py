"""The model whose checkpoints are damaged, in every format."""

from __future__ import annotations

import pytest
from torch import Tensor
from zoo import example

from lightning_spectral import ResidualBlock, find_blocks


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in example("gpt2").build().state_dict().items() if ".h." in name}


@pytest.fixture(scope="module")
def blocks() -> tuple[ResidualBlock, ...]:
    return find_blocks(example("gpt2").build())
