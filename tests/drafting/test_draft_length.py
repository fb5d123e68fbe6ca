"""What is bought: the best prefix of every draft, at prices that are given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafting.draft_length import AdaptiveLength, FixedLength, Market, Option, Order, buy, survivals

RATES = st.lists(st.floats(0.01, 1.0), max_size=4)


def market(num_decodes: int, step_s: Sequence[float], draft_s: float = 0.0) -> Market:
    """`step_s`: seconds with 0, 1, ... draft tokens, going on as it ends. `draft_s`: of a round, whatever its size."""
    slope = step_s[-1] - step_s[-2]
    rest = step_s[-1] + slope * np.arange(1, 200)
    return Market(num_decodes, np.concatenate((step_s, rest)), lambda depth, num_seqs: depth * draft_s)


FREE = market(1, [1.0, 1.0])
LINEAR = market(1, [1.0, 2.0])


def speed(offers: Sequence[Sequence[float]], counts: Sequence[int], prices: Market) -> float:
    gained = sum(sum(offer[:count]) for offer, count in zip(offers, counts, strict=True))
    return (prices.num_decodes + gained) / float(prices.verify_s[sum(counts)])


@settings(max_examples=200)
@given(
    st.lists(RATES.map(survivals), min_size=1, max_size=3),
    st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12),
    st.integers(1, 4),
)
def test_no_other_prefixes_are_faster(offers: list[tuple[float, ...]], slopes: list[float], num_decodes: int) -> None:
    prices = market(num_decodes, list(itertools.accumulate(slopes, initial=1.0)))
    counts, rate = buy(offers, prices)
    assert rate == pytest.approx(speed(offers, counts, prices))
    choices = itertools.product(*(range(len(offer) + 1) for offer in offers))
    assert rate >= max(speed(offers, choice, prices) for choice in choices) * (1 - 1e-9)


def test_nothing_is_bought_where_a_token_costs_a_step() -> None:
    assert buy([(0.9, 0.8), (0.99,)], market(2, [2.0, 3.0])) == ([0, 0], 1.0)


def test_everything_is_bought_where_tokens_are_free() -> None:
    assert buy([(0.5, 0.1), (0.01,)], market(2, [1.0, 1.0]))[0] == [2, 1]


def test_the_likelier_draft_is_bought_first() -> None:
    prices = market(2, [1.0, 1.1, 1.2, 1.9])
    assert buy([(0.3, 0.2), (0.9, 0.8)], prices)[0] == [0, 2]


def test_what_is_sunk_makes_more_tokens_worth_their_price() -> None:
    offers = [(0.5, 0.4, 0.3)]
    prices = market(1, [1.0, 1.45, 1.9])
    assert buy(offers, prices)[0] == [1]
    assert buy(offers, prices, sunk_s=1.0)[0] == [3]


def test_an_empty_offer_is_an_answer() -> None:
    assert buy([], LINEAR) == ([], 1.0)
    assert AdaptiveLength().order([], LINEAR) == []
    assert AdaptiveLength().keep([], LINEAR) == []


class TestAdaptive:
    def test_a_draft_at_hand_is_taken_before_the_model_is_asked(self) -> None:
        option = Option(found=survivals([0.9] * 4), model=survivals([0.7] * 4))
        assert AdaptiveLength().order([option], market(1, [1.0, 1.01], draft_s=0.01)) == [Order(4)]

    def test_the_model_is_asked_where_nothing_good_is_at_hand(self) -> None:
        option = Option(found=(0.1,), model=survivals([0.8] * 8))
        (order,) = AdaptiveLength().order([option], market(1, [1.0, 1.02], draft_s=0.02))
        assert order.by_model
        assert 4 <= order.num_drafts <= 8

    def test_a_bad_start_of_the_model_hides_no_better_depth(self) -> None:
        """At depth 1 and 2 the draft at hand is as good; only further down the model pays."""
        option = Option(found=(0.95, 0.5), model=survivals([0.9] * 8))
        (order,) = AdaptiveLength().order([option], market(1, [1.0, 1.0], draft_s=0.01))
        assert (order.num_drafts, order.by_model) == (8, True)

    @pytest.mark.parametrize(("draft_s", "depth"), [(0.0, 8), (0.3, 2), (0.8, 0)])
    def test_depth_falls_with_the_models_cost(self, draft_s: float, depth: int) -> None:
        option = Option(model=survivals([0.75] * 8))
        (order,) = AdaptiveLength().order([option], market(1, [1.0, 1.0], draft_s))
        assert order.num_drafts == depth

    def test_sequences_are_judged_one_by_one(self) -> None:
        options = [Option(found=(0.9, 0.85)), Option(found=(0.05,)), Option()]
        assert AdaptiveLength().order(options, market(3, [1.0, 1.1])) == [Order(2), Order(0), Order(0)]

    def test_a_gain_within_the_error_is_none(self) -> None:
        assert AdaptiveLength().order([Option(found=(0.51,))], market(1, [1.0, 1.5, 2.5])) == [Order()]

    def test_catching_up_is_part_of_the_price(self) -> None:
        ready = Option(model=survivals([0.7] * 4))
        behind = Option(model=survivals([0.7] * 4), reading_s=2.0)
        prices = market(1, [1.0, 1.0], draft_s=0.05)
        assert AdaptiveLength().order([ready], prices)[0].num_drafts == 4
        assert AdaptiveLength().order([behind], prices) == [Order()]

    def test_a_further_round_has_to_pay_for_itself_and_for_verification(self) -> None:
        (order,) = AdaptiveLength().order([Option(model=survivals([0.8] * 4))], market(1, [1.0, 1.05], draft_s=0.1))
        rate = (1 + sum(survivals([0.8] * 4))) / (1.2 + 0.4)
        assert order.second_price == pytest.approx(rate)

    def test_what_turned_out_unlikely_is_not_verified(self) -> None:
        prices = market(1, [1.0, 1.3])
        assert AdaptiveLength().keep([(0.95, 0.9, 0.05)], prices) == [2]


class TestFixed:
    def test_the_length_is_kept_whatever_it_costs(self) -> None:
        policy = FixedLength(3)
        options = [Option(found=(0.1,) * 8), Option(model=(0.1,) * 8), Option(found=(0.1,)), Option()]
        orders = policy.order(options, LINEAR)
        assert [(one.num_drafts, one.by_model) for one in orders] == [(3, False), (3, True), (1, False), (0, False)]
        assert policy.keep([(0.1,) * 8, (0.1,)], LINEAR) == [3, 1]

    def test_the_model_is_asked_where_it_promises_more(self) -> None:
        poor_and_long, good = (0.2,) * 8, (0.9, 0.8)
        orders = FixedLength(2).order([Option(poor_and_long, good), Option(good, poor_and_long)], LINEAR)
        assert [(one.num_drafts, one.by_model) for one in orders] == [(2, True), (2, False)]

    def test_zero_is_plain_decoding(self) -> None:
        assert FixedLength(0).order([Option(found=(1.0,))], FREE)[0].num_drafts == 0


def test_survival_is_the_product_of_the_rates() -> None:
    assert survivals([0.5, 0.5, 0.2]) == pytest.approx((0.5, 0.25, 0.05))
