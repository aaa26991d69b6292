"""Series of measurements in, events out: three levels, and two witnesses for an alarm. Pure.

A ratio alone does not say that anything is wrong: the zone is a heuristic (see the README). So

* **info**: a block has left the safe zone or come back;
* **warning**: a block stays outside and drifts away from where this very run had settled; or the tokens have become one
  vector although no ratio is outside;
* **alarm**: two witnesses agree. The first is a ratio that stays outside. The second is measured on the tokens: their
  residual falls over depth toward collapse, or over training with a robust trend that leads there soon, or is there.

The two sides of the zone are not alike. Attention averages tokens and an MLP does not: at initialization only a
dominating attention makes tokens collapse (Dong, Cordonnier and Loukas, arXiv:2103.03404). Ratios above the zone are
common in healthy runs, and so is a dip of the token residual in their first steps. So above the zone an alarm takes
tokens that have collapsed already, and below it tokens that are on their way.
"""

from lightning_spectral.alarms.memory import Memory
from lightning_spectral.alarms.rules import falling_tokens, observe
from lightning_spectral.records import Event

__all__ = ["Event", "Memory", "falling_tokens", "observe"]
