"""Strategies that are refused, and how that is said."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_spectral import ConfigurationError
from lightning_spectral.monitor.strategies import check_strategy


class Derived(FSDPStrategy):
    """What a user might have made of it."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, Derived])
def test_flattened_weights_are_refused_with_what_to_use_instead(strategy: type[FSDPStrategy]):
    expected = r"cannot work under FSDPStrategy: it flattens .* Use ModelParallelStrategy with fully_shard in configure"
    with pytest.raises(ConfigurationError, match=expected):
        check_strategy(strategy())


@pytest.mark.parametrize("strategy", [DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy])
def test_the_others_are_not(strategy: type):
    check_strategy(strategy())
