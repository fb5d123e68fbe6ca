"""Which threshold goes with which goal."""

from pathlib import Path

import numpy as np

from gateway.auto.live_router import load_router
from gateway.auto.threshold import FixedThreshold, threshold_of
from router_models.policy_config import PriceGoal, ShareGoal
from tests.gateway.auto_world import auto_config


def test_a_price_needs_no_threshold(router: Path) -> None:
    threshold = threshold_of(PriceGoal(regret_usd=1.0), load_router(router, auto_config(router)))
    threshold.observe(0.3, True)
    assert threshold.value() is None


def test_a_fixed_threshold_learns_nothing() -> None:
    threshold = FixedThreshold(0.25)
    threshold.observe(0.9, False)
    assert threshold.value() == 0.25


def test_a_share_begins_with_usual_prompts_and_is_held_on_others(router: Path) -> None:
    live = load_router(router, auto_config(router))
    threshold = threshold_of(ShareGoal(strong_share=0.25), live)
    first = threshold.value()
    assert first is not None
    assert abs(np.mean(np.array(live.usual_needs()) >= first) - 0.25) < 0.05
    taken = []
    for need in np.random.default_rng(0).normal(5.0, 1.0, 600):
        value = threshold.value()
        assert value is not None
        taken.append(need >= value)
        threshold.observe(need, bool(taken[-1]))
    assert abs(np.mean(taken) - 0.25) < 0.03
