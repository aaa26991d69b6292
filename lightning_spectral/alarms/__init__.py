"""Series of measurements in, events out. Pure.

Three levels, by what is known and not by the ratio:

* **failure**: the run has failed. Something is not finite; all tokens of a sample are one vector; all samples are one;
  nothing moves;
* **warning**: a signal that came before failures in this project's benchmark, with its measured quality;
* **note**: news, such as a ratio that leaves the safe zone or drifts. The safe zone is a heuristic.

The ratio explains and does not gate. Most Transformers that collapse in public reports have ratios inside the safe
zone, and healthy ones have ratios above it. Where attention outweighs the MLP, a message about tokens says so:
attention averages tokens, and an MLP does not (Dong, Cordonnier and Loukas, arXiv:2103.03404).
"""

from lightning_spectral.alarms.memory import Memory
from lightning_spectral.alarms.rules import falling_tokens, observe
from lightning_spectral.records import Event

__all__ = ["Event", "Memory", "falling_tokens", "observe"]
