"""The ceiling law: numbers in, decisions out. The plant is the real one: each norm is proportional to its scale."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lightning_spectral import GainCeiling
from lightning_spectral.control.law import Action, Reading, State
from lightning_spectral.errors import ConfigurationError

ZONE = (0.5, 2.0)
CASES = 2000
MARGIN = "outside the safe zone less its margin"
LAW = GainCeiling(ceiling=2.0, margin=0.2, floor=0.1)  # one block of two branches: the ceiling is 2 / √2 = 1.41


def reading(mlp: float | None, attention: float | None, **values: Any) -> Reading:
    """Return what the law sees of a block with these norms, both of whose branches have a scale."""
    return Reading(None, 0.0, 0.0, mlp_norm=mlp, attention_norm=attention, **values)


def only(law: GainCeiling, seen: Reading, state: State | None = None, step: int = 10) -> tuple[Action | None, State]:
    """Decide about one block."""
    actions, (after,) = law.decide(ZONE, step, [seen], [] if state is None else [state])
    return (actions[0] if actions else None), after


def lowered(seen: Reading, action: Action | None) -> Reading:
    """Return what the law sees after its action."""
    mlp, attention = (0.0, 0.0) if action is None else (action.mlp, action.attention)
    norms = [
        None if norm is None else norm * math.exp(change)
        for norm, change in ((seen.mlp_norm, mlp), (seen.attention_norm, attention))
    ]
    return replace(seen, mlp_norm=norms[0], attention_norm=norms[1])


# By hand: 2 / √2 = 1.4142, e^-0.2 · 2 = 1.6375, 0.1 · 1.4142 = 0.1414


@pytest.mark.parametrize(
    ("mlp", "attention", "after", "reason"),
    [
        (1.0, 1.2, (1.0, 1.2), None),
        (3.0, 1.0, (1.4142, 1.0), "MLP above its ceiling: 3, limit 1.414"),
        (
            5.0,
            5.0,
            (1.4142, 1.4142),
            "MLP above its ceiling: 5, limit 1.414, attention above its ceiling: 5, limit 1.414",
        ),
        (1.2, 0.3, (0.4912, 0.3), f"MLP {MARGIN}: 1.2, limit 0.4912"),
        (0.3, 1.2, (0.3, 0.4912), f"attention {MARGIN}: 1.2, limit 0.4912"),
        (9.0, 0.3, (0.4912, 0.3), f"MLP {MARGIN}: 9, limit 0.4912"),
        (
            1.2,
            0.01,
            (0.1414, 0.01),
            "MLP outside the safe zone less its margin, lowered to its floor: 1.2, limit 0.1414",
        ),
        (0.12, 0.01, (0.12, 0.01), None),  # below it: any ratio
        (0.3, 0.2, (0.3, 0.2), None),
        (1.2, None, (1.2, None), None),
        (3.0, None, (1.4142, None), "MLP above its ceiling: 3, limit 1.414"),
        (1.2, 0.0, (1.2, 0.0), None),  # a branch that starts at zero says nothing about the other
        (math.nan, 3.0, (math.nan, 1.4142), "attention above its ceiling: 3, limit 1.414"),
        (math.inf, 3.0, (math.inf, 1.4142), "attention above its ceiling: 3, limit 1.414"),
        (None, None, (None, None), None),
    ],
)
def test_a_block_by_hand(mlp: float | None, attention: float | None, after: tuple[Any, Any], reason: str | None):
    seen = reading(mlp, attention)
    action, _ = only(LAW, seen)
    found = lowered(seen, action)
    assert [found.mlp_norm, found.attention_norm] == pytest.approx(list(after), abs=1e-4, nan_ok=True)
    assert (None if action is None else action.reason) == reason


def test_the_ceiling_falls_with_the_number_of_branches():
    """All branches count, also those that have no norm, such as mixers, and those that are in no ratio."""
    seen = [reading(9.0, 9.0), reading(9.0, None, kinds=1), reading(None, None, kinds=1), reading(9.0, 9.0, kinds=5)]
    actions, _ = LAW.decide(ZONE, 0, seen, [])
    assert [action.block for action in actions] == [0, 1, 3]
    assert [9 * math.exp(action.mlp) for action in actions] == pytest.approx([2 / math.sqrt(2 + 1 + 1 + 5)] * 3)


def test_a_branch_without_a_scale_stays_and_is_what_the_other_follows():
    frozen = replace(reading(9.0, 9.0), attention=None)
    action, _ = only(LAW, frozen)
    assert (math.exp(action.mlp) * 9, action.attention) == (pytest.approx(math.sqrt(2)), 0.0)
    assert only(LAW, replace(reading(1.2, 0.3), mlp=None))[0] is None


def test_the_start_of_a_trained_model_is_no_reason_to_lower_it():
    """Growth is: a branch comes back to where it was, and not farther."""
    start = reading(20.0, 4.0, trained=True)
    action, state = only(LAW, start)
    assert action is None
    action, state = only(LAW, reading(30.0, 3.0), state)
    assert (30 * math.exp(action.mlp), action.attention) == (pytest.approx(20.0), 0.0)
    action, _ = only(LAW, reading(10.0, 8.0), state)
    assert (action.mlp, 8 * math.exp(action.attention)) == (0.0, pytest.approx(4.0))
    # A branch that was not there at the start, an expert that slept, has the ceiling.
    _, state = only(LAW, reading(20.0, 0.0, trained=True))
    action, _ = only(LAW, reading(20.0, 8.0), state)
    assert (action.mlp, 8 * math.exp(action.attention)) == (0.0, pytest.approx(math.sqrt(2)))


def test_that_the_law_can_do_no_more_is_told_once():
    """A branch that grows on is lowered to its floor each time, and the ratio stays outside."""
    seen = reading(0.5, 0.2)
    first, state = only(LAW, seen)
    assert (first.begins, first.held) == (True, False)
    floor, state = only(LAW, reading(0.5, 0.01), state)
    assert (floor.begins, floor.held, floor.moves) == (False, True, True)
    again, state = only(LAW, reading(0.3, 0.01), state)
    assert (again.held, again.moves) == (False, True)
    assert "lowered to its floor" in again.reason
    _, state = only(LAW, reading(20.0, 4.0, trained=True))
    grown, _ = only(LAW, reading(30.0, 3.0), state)
    assert grown.held
    assert grown.reason == "MLP above its ceiling, lowered to its norm at the start: 30, limit 20"


# Laws


def cases(seed: int) -> Iterator[tuple[GainCeiling, Reading, State]]:
    source = random.Random(seed)
    for _ in range(CASES):
        law = GainCeiling(
            ceiling=math.exp(source.gauss(0, 1)), margin=source.uniform(0, 0.6), floor=source.choice([1.0, 0.3, 0.01])
        )
        norms = [None if source.random() < 0.05 else math.exp(source.gauss(0, 2)) for _ in ("mlp", "attention")]
        state = {"begun": False} | {name: source.gauss(0, 1) for name in ("mlp", "attention") if source.random() < 0.3}
        yield law, reading(*norms), state


def slowly(law: GainCeiling, seen: Reading, state: State) -> list[float | None]:
    """Return the norms that are left where each branch in turn gives way a little, as long as one has to."""
    norms = [seen.mlp_norm, seen.attention_norm]
    ceiling = law.ceiling / math.sqrt(2)
    starts = [math.exp(state.get(name, -math.inf)) for name in ("mlp", "attention")]
    moved = True
    while moved:
        moved = False
        for mine, other in ((0, 1), (1, 0)):
            if norms[mine] is None:
                continue
            too_much = norms[mine] > max(ceiling, starts[mine])
            if norms[other] is not None and norms[other] <= max(ceiling, starts[other]):
                ratio = norms[mine] / norms[other]
                may = norms[mine] > max(law.floor * ceiling, starts[mine])
                too_much = too_much or (may and ratio > 2 * math.exp(-law.margin))
            if too_much:
                norms[mine] *= 0.999
                moved = True
    return norms


def test_one_action_is_what_giving_way_little_by_little_ends_in():
    for law, seen, state in list(cases(0))[:300]:
        found = lowered(seen, only(law, seen, state)[0])
        slow = slowly(law, seen, state)
        for norm, expected in zip((found.mlp_norm, found.attention_norm), slow, strict=True):
            assert norm == (expected and pytest.approx(expected, rel=3e-3))


def test_nothing_is_raised_and_the_second_time_there_is_nothing_to_do():
    acted = 0
    for law, seen, state in cases(1):
        action, after = only(law, seen, state)
        if action is not None:
            acted += 1
            assert action.moves
            assert max(action.mlp, action.attention) <= 0.0
            assert only(law, lowered(seen, action), after)[0] is None
    assert 0.3 * CASES < acted < CASES


def test_what_is_left_is_inside_or_weak_or_was_so_at_the_start():
    for law, seen, state in cases(2):
        found = lowered(seen, only(law, seen, state)[0])
        if found.mlp_norm is None or found.attention_norm is None:
            continue
        ratio = found.mlp_norm / found.attention_norm
        strong, name = (found.mlp_norm, "mlp") if ratio > 1 else (found.attention_norm, "attention")
        weakest = max(law.floor * law.ceiling / math.sqrt(2), math.exp(state.get(name, -math.inf)))
        assert 0.5 * math.exp(law.margin - 2e-3) < ratio < 2 * math.exp(2e-3 - law.margin) or strong <= weakest * 1.002


def test_mlp_and_attention_are_alike():
    """The safe zone is symmetric in ln ρ, and so is the law."""
    for law, seen, state in cases(3):
        swapped = {"begun": False} | {
            new: state[old] for new, old in (("mlp", "attention"), ("attention", "mlp")) if old in state
        }
        one, _ = only(law, seen, state)
        two, _ = only(law, reading(seen.attention_norm, seen.mlp_norm), swapped)
        assert (one is None) is (two is None)
        if one is not None:
            assert (one.mlp, one.attention) == pytest.approx((two.attention, two.mlp))


def test_scales_say_nothing_that_norms_do_not():
    for law, seen, state in list(cases(4))[:200]:
        one, two = (only(law, replace(seen, mlp=scale, attention=-scale), state) for scale in (0.0, 3.0))
        assert one == two


# State


def test_the_state_is_plain_and_says_what_was_told():
    law, told, state = LAW, [], None
    for norms in ((1.0, 1.0), (9.0, 1.0), (1.0, 1.0), (9.0, 9.0)):
        action, state = only(law, reading(*norms, trained=False), state)
        state = json.loads(json.dumps(state))
        told.append(action and action.begins)
    assert told == [None, True, None, False]


def test_states_of_other_blocks_are_forgotten():
    _, state = only(LAW, reading(20.0, 4.0, trained=True))
    actions, _ = LAW.decide(ZONE, 10, [reading(9.0, 1.0), reading(1.0, 1.0)], [state])
    assert [action.block for action in actions] == [0]


def test_nothing_is_done_before_the_warm_up_is_over():
    law = replace(LAW, warmup_steps=20)
    assert only(law, reading(9.0, 1.0), step=19)[0] is None
    assert only(law, reading(9.0, 1.0), step=20)[0] is not None


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ceiling": 0.0}, r"ceiling=0\.0: expected a number above 0"),
        ({"ceiling": math.inf}, r"ceiling=inf: expected a number above 0"),
        ({"ceiling": "3"}, r"ceiling='3': expected a number above 0"),
        ({"margin": -0.1}, r"margin=-0\.1: expected a number at least 0"),
        ({"floor": 0.0}, r"floor=0\.0: expected a number above 0 and at most 1"),
        ({"floor": 1.1}, r"floor=1\.1: expected a number above 0 and at most 1"),
        ({"warmup_steps": 1.5}, r"warmup_steps=1\.5: expected an integer of at least 0"),
        ({"dry_run": 1}, r"dry_run=1: expected True or False"),
        ({"learnable": "no"}, r"learnable='no': expected True or False"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        GainCeiling(**settings)


@pytest.mark.parametrize(
    ("margin", "zone", "distance"), [(0.2, (0.9, 1.5), "0.105"), (0.7, ZONE, "0.693"), (0.0, (1.5, 3.0), "-0.405")]
)
def test_the_safe_zone_has_room_for_the_margin(margin: float, zone: tuple[float, float], distance: str):
    message = rf"margin={margin}: expected less than the distance from 1 to either edge of .*, {distance} nats"
    with pytest.raises(ConfigurationError, match=message):
        GainCeiling(margin=margin).check(zone)
    GainCeiling(margin=0.1).check((0.9, 1.5))
