"""What a step's tokens cost, from costs that were learnt."""

from __future__ import annotations

import pytest

from drafting.cost import StepCost
from drafting.prices import Load, Prices, per_step


def learnt(base_s: float, token_s: float) -> StepCost:
    """A cost that has seen enough of a straight line."""
    cost = StepCost()
    for turn in range(300):
        num_tokens = (1, 2, 4, 8, 12, 16, 32, 64)[turn % 8]
        cost.observe(num_tokens, 4, 100, base_s + token_s * num_tokens)
    return cost


DECODING = Load(num_tokens=4, num_seqs=4, num_kv_tokens=100, num_decodes=4)
MIXED = Load(num_tokens=52, num_seqs=4, num_kv_tokens=100, num_decodes=4)


def test_a_draft_token_costs_what_the_forward_takes_longer() -> None:
    market = Prices(learnt(1.0, 0.02), StepCost()).market(DECODING, max_drafts=8)
    assert len(market.verify_s) == 10
    assert market.verify_s[0] == pytest.approx(1.08, rel=0.08)
    assert market.verify_s[8] / market.verify_s[0] == pytest.approx(1.24 / 1.08, rel=0.04)


def test_prefill_in_the_same_step_is_not_charged_to_drafts() -> None:
    prices = Prices(learnt(1.0, 0.02), StepCost())
    alone, mixed = prices.market(DECODING, 4).verify_s, prices.market(MIXED, 4).verify_s
    assert mixed[0] == pytest.approx(alone[0], rel=1e-6)
    assert mixed[4] - mixed[0] == pytest.approx(4 * 0.02, abs=0.03)


def test_a_model_that_never_ran_is_free_until_it_has() -> None:
    prices = Prices(learnt(1.0, 0.02), StepCost())
    assert prices.draft_s(DECODING, 3, 4) == prices.reading_s(1000, 1001) == 0.0


def test_rounds_and_reading_of_the_model() -> None:
    prices = Prices(learnt(1.0, 0.02), learnt(0.1, 0.001))
    assert prices.draft_s(DECODING, 3, 4) == pytest.approx(3 * 0.104, rel=0.1)
    assert prices.draft_s(DECODING, 0, 4) == prices.draft_s(DECODING, 3, 0) == 0.0
    assert prices.reading_s(2, 100) == 0.0
    assert prices.reading_s(33, 100) == pytest.approx(32 * 0.001, rel=0.5)


def test_reading_is_spread_over_the_steps_that_profit() -> None:
    assert per_step(3.2, num_left=1000) == pytest.approx(0.1)
    assert per_step(3.2, num_left=8) == pytest.approx(0.8)
    assert per_step(3.2, num_left=1) == pytest.approx(3.2)


def test_plain_decoding_of_the_same_tokens() -> None:
    prices = Prices(learnt(1.0, 0.02), StepCost())
    assert prices.plain_s(DECODING, 4) == pytest.approx(1.08, rel=0.05)
    assert prices.plain_s(DECODING, 12) == pytest.approx(3 * 1.08, rel=0.05)
    assert prices.plain_s(MIXED, 8) == pytest.approx(2.04 + 1.08, rel=0.1)
    assert prices.plain_s(Load(16, 1, 16, 0), 1) == Prices(StepCost(), StepCost()).plain_s(DECODING, 4) == 0.0


def test_what_was_never_measured_is_not_kept() -> None:
    assert Prices(StepCost(), StepCost()).state() == {"verify": None, "draft": None}
    state = Prices(learnt(1.0, 0.02), StepCost()).state()
    assert state["draft"] is None
    assert StepCost.restore(state["verify"]).is_known
