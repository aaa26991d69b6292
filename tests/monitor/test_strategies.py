"""Strategies that are refused, and how that is said."""

from __future__ import annotations

import re

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.monitor.strategies import check_strategy


class Derived(DeepSpeedStrategy):
    """What a user might have made of it."""


def refusal(strategy: Strategy) -> str:
    """Return what is said against a strategy; nothing if the monitor works under it."""
    try:
        check_strategy(strategy)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, Derived])
def test_partitioned_weights_are_refused_with_what_to_use_instead(kind: type[Strategy]):
    strategy = kind.__new__(kind)  # to initialize it takes the library
    expected = r"cannot work under DeepSpeedStrategy: it partitions weights .* Use DDPStrategy, FSDPStrategy or Model"
    assert re.search(expected, refusal(strategy))


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy])
def test_the_others_are_not(kind: type[Strategy]):
    assert not refusal(kind())
