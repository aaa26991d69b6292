"""What to try after a failure, in the order in which it helped in `benchmarks/remedies.py` where that was tried.

A message names the first thing; the rest is in the event and in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ADVICE", "WORDS"]

WORDS: Mapping[str, str] = {
    "go_back": "go back to the last good checkpoint, and train on with a tenth of the learning rate",
    "warm_up": "restart with a longer warm-up of the learning rate",
    "lower_rate": "lower the learning rate to a tenth",
    "pre_norm": "restart with norm layers in front of attention and MLP (norm_first=True in PyTorch's layers)",
    "ceiling": "restart with auto_rescale=True where you make this monitor: factors then limit attention and MLP",
    "check_data": "look at the batches just before",
    "check_mask": "look for samples whose tokens are all masked",
    "stop_gradient": "without labels, stop the gradient of one view or add a term to the loss that keeps outputs apart",
    "lower_attention": "restart with weaker attention (balance_init_)",
    "give_to_optimizer": "check that the optimizer holds the parameters of the model that is trained",
    "check_rate": "check that the learning rate is not 0",
    "check_gradients": "look for gradients that are None or zero",
    "qk_norm": "restart with a norm on queries and keys (QK-norm)",
}
"""A sentence for every piece of advice, by its name."""

ADVICE: Mapping[str, tuple[str, ...]] = {
    "not_finite": ("go_back", "check_mask", "check_data", "qk_norm"),
    "tokens_collapsed": ("pre_norm", "ceiling", "lower_rate", "warm_up"),
    "samples_collapsed": ("ceiling", "lower_rate", "stop_gradient"),
    "logits_exploding": ("qk_norm", "lower_rate"),
    "nothing_moves": ("give_to_optimizer", "check_rate", "check_gradients"),
    "tokens_collapsing": ("ceiling", "lower_attention", "lower_rate"),
}
"""What to try after an event, by the name of its rule."""
