"""Series of measurements in, events out: three levels, and two witnesses for an alarm. Pure.

The safe zone is a heuristic (see the README), so a ratio outside of it is not a fault by itself. Hence three levels:

* **info**: a block has left the safe zone or come back;
* **warning**: a block stays outside and drifts away from its baseline in this run; or the tokens have become one vector
  although no ratio is outside;
* **alarm**: two witnesses agree. The first is a ratio that stays outside. The second is the token residual: it falls
  over depth toward collapse, or a robust trend over training leads to collapse soon, or it has reached collapse.

Below the zone, an alarm needs tokens on their way to collapse. Above the zone, it needs tokens that have collapsed. The
reason: attention averages tokens and an MLP does not, so that at initialization only a dominating attention makes
tokens collapse (Dong, Cordonnier and Loukas, arXiv:2103.03404). Healthy runs often have ratios above the zone, and a
dip of the token residual in their first steps.
"""

from lightning_spectral.alarms.memory import Memory
from lightning_spectral.alarms.rules import falling_tokens, observe
from lightning_spectral.records import Event

__all__ = ["Event", "Memory", "falling_tokens", "observe"]
