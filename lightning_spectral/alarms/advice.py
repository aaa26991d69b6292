"""What to try after a failure, in the order in which it helped in `benchmarks/remedies.py` where that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ADVICE", "WORDS", "tried"]

WORDS: Mapping[str, str] = {
    "go_back": "go back to the last good checkpoint",
    "warm_up": "warm the learning rate up over more steps",
    "lower_rate": "lower the learning rate to a tenth",
    "pre_norm": "put the norms in front of the branches (norm_first=True)",
    "ceiling": "let the ceiling law hold both branches down (auto_rescale=True)",
    "check_data": "look at the batches just before",
    "check_mask": "look for rows whose tokens are all masked",
    "stop_gradient": "stop the gradient of one view, or add a term that keeps outputs apart",
    "lower_attention": "start attention weaker (balance_init_)",
    "give_to_optimizer": "give the optimizer the parameters that shall learn, after they are made",
    "check_rate": "look at the learning rate that the optimizer has now",
    "check_gradients": "look for gradients that are None or zero",
    "qk_norm": "normalize queries and keys",
}
"""A sentence for every piece of advice, by its name."""

ADVICE: Mapping[str, tuple[str, ...]] = {
    "not_finite": ("go_back", "lower_rate", "check_mask", "check_data", "qk_norm"),
    "tokens_collapsed": ("pre_norm", "ceiling", "lower_rate", "warm_up"),
    "samples_collapsed": ("lower_rate", "ceiling", "stop_gradient"),
    "logits_exploding": ("qk_norm", "lower_rate"),
    "nothing_moves": ("give_to_optimizer", "check_rate", "check_gradients"),
    "tokens_collapsing": ("ceiling", "lower_attention", "lower_rate"),
}
"""What to try after an event, by the name of its rule."""


def tried(advice: Sequence[str]) -> str:
    """Return a sentence of what to try first, and what then."""
    first, *others = (WORDS[name] for name in advice)
    return f"Try this first: {first}" + (f"; if it does not help: {'; '.join(others)}" if others else "")
