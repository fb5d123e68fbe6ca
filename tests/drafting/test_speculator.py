"""Who is asked, what is verified of the answers, and what is learnt from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.draft_length import AdaptiveLength, FixedLength, LengthPolicy, Market, Option, Order
from drafting.draft_model import DraftModel, Guess, Reading
from drafting.prices import Load, Prices
from drafting.protocol import Draft, Drafter, DraftRequest, Source, Verdict
from drafting.speculator import Chosen, Speculator


class Fixed:
    """Always the same draft."""

    def __init__(self, *token_ids: int, belief: float = 0.5) -> None:
        self.draft = Draft(token_ids, (belief,) * len(token_ids))
        self.asked: list[int] = []
        self.verdicts: list[Verdict] = []
        self.forgotten: list[int] = []

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.asked += [one.seq_id for one in requests]
        return [self.draft] * len(requests)

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts += verdicts

    def forget(self, seq_id: int) -> None:
        self.forgotten.append(seq_id)


class FakeReader:
    """Guesses 70, 71, ... Has read all but the newest token."""

    def __init__(self, max_position: int = 1000) -> None:
        self.max_position = max_position
        self.lengths: dict[int, int] = {}

    def num_read(self, seq_id: int) -> int:
        return self.lengths[seq_id] - 1

    def read(self, readings: Sequence[Reading]) -> list[Guess | None]:
        return [Guess(70 + len(one.drafts), 0.9) for one in readings]


def request(seq_id: int, max_drafts: int = 4, source: Source | None = None, num_tokens: int = 5) -> DraftRequest:
    return DraftRequest(seq_id, [1] * num_tokens, 2, max_drafts, num_left=max_drafts + 1, source=source)


class Stage:
    """A speculator that has seen a step, so that it knows a price."""

    def __init__(
        self, lookups: dict[Source, Drafter], policy: LengthPolicy | int = 4, reader: FakeReader | None = None
    ) -> None:
        self.acceptance: dict[Source, Acceptance] = {source: Acceptance() for source in lookups}
        self.prices = Prices(StepCost(), StepCost())
        self.reader, model = reader, None
        if reader is not None:
            self.acceptance["model"] = Acceptance()
            model = DraftModel(reader, self.acceptance["model"], self.prices.draft)
        policy = FixedLength(policy) if isinstance(policy, int) else policy
        self.speculator = Speculator(policy, lookups, model, self.acceptance, self.prices)
        self.prices.verify.observe(1, 1, 10, 0.01)

    def plan(self, *requests: DraftRequest) -> list[int]:
        if self.reader is not None:
            self.reader.lengths.update((one.seq_id, len(one.token_ids)) for one in requests)
        return self.speculator.plan(requests, Load(max(1, len(requests)), max(1, len(requests)), 10, len(requests)))

    def step(self, *requests: DraftRequest) -> dict[int, Chosen]:
        counts = self.plan(*requests)
        return self.speculator.draft({one.seq_id: n for one, n in zip(requests, counts, strict=True) if n})

    def settle(self, seq_id: int, emitted: list[int]) -> None:
        verdict = Verdict(seq_id, [1] * 5 + emitted, 2, len(emitted))
        self.speculator.observe([verdict], 3, 0.01)


class TestChoice:
    def test_a_good_lookup_is_taken_before_the_model(self) -> None:
        stage = Stage({"ngram": Fixed(5, 6, 7, 8, belief=0.95)}, reader=FakeReader())
        assert stage.step(request(0)) == {0: Chosen("ngram", Draft((5, 6, 7, 8), (0.95,) * 4))}

    @pytest.mark.parametrize("found", [Fixed(), Fixed(5, 6, belief=0.1)])
    def test_the_model_is_asked_where_lookups_have_nothing_good(self, found: Fixed) -> None:
        stage = Stage({"ngram": found}, reader=FakeReader())
        assert stage.step(request(0))[0] == Chosen("model", Draft((70, 71, 72, 73), (0.9,) * 4))

    def test_where_nothing_is_found_nothing_is_priced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = Stage({"ngram": Fixed()}, AdaptiveLength())
        monkeypatch.setattr(Prices, "market", lambda *_: pytest.fail("it takes as long as the lookup"))
        assert stage.step(request(0)) == {}

    def test_the_likelier_draft_is_taken(self) -> None:
        stage = Stage({"ngram": Fixed(5, 6, belief=0.1), "suffix": Fixed(7, 8, belief=0.95)})
        assert stage.step(request(0))[0].source == "suffix"

    def test_a_request_may_name_its_drafter(self) -> None:
        lookups: dict[Source, Drafter] = {"ngram": Fixed(5), "suffix": Fixed(7)}
        stage = Stage(lookups, reader=FakeReader())
        sources: tuple[Source, ...] = ("ngram", "suffix", "model", "prediction")
        chosen = stage.step(*[request(i, source=one) for i, one in enumerate(sources)])
        assert {seq_id: one.source for seq_id, one in chosen.items()} == {0: "ngram", 1: "suffix", 2: "model"}
        assert lookups["ngram"].asked == [0]  # type: ignore[attr-defined]

    def test_nothing_is_cut_away_but_what_was_not_granted(self) -> None:
        stage = Stage({"ngram": Fixed(5, 6, 7, 8)})
        assert stage.plan(request(0), request(1), request(2)) == [4, 4, 4]
        chosen = stage.speculator.draft({0: 4, 2: 1})
        assert {seq_id: one.draft.token_ids for seq_id, one in chosen.items()} == {0: (5, 6, 7, 8), 2: (5,)}


class TestBounds:
    @pytest.mark.parametrize("reader", [None, FakeReader()])
    @pytest.mark.parametrize("policy", [9, AdaptiveLength()])
    def test_never_more_than_the_request_allows(self, policy: LengthPolicy | int, reader: FakeReader | None) -> None:
        stage = Stage({"ngram": Fixed(*range(9), belief=0.99)}, policy, reader)
        for _ in range(40):
            requests = [request(seq_id, max_drafts=most) for seq_id, most in enumerate((1, 2, 5, 8))]
            counts = stage.plan(*requests)
            assert all(count <= one.max_drafts for count, one in zip(counts, requests, strict=True))
            chosen = stage.speculator.draft({one.seq_id: n for one, n in zip(requests, counts, strict=True) if n})
            for seq_id, one in chosen.items():
                assert 0 < len(one.draft.token_ids) <= requests[seq_id].max_drafts
            stage.settle(0, [0, 1, 2])

    def test_a_deep_model_draft_for_one_is_none_for_another_with_little_room(self) -> None:
        class Deep(AdaptiveLength):
            explores = False

            def order(self, options: Sequence[Option], market: Market) -> list[Order]:
                return self._order(options, market, 8)[0]

        stage = Stage({}, Deep(), FakeReader(max_position=12))
        assert stage.plan(request(0, 2), request(1, 8), request(2, 8, num_tokens=9)) == [2, 7, 3]

    def test_the_model_is_told_what_tokens_cost_on_top_of_those_that_lookups_have(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Both(AdaptiveLength):
            def order(self, options: Sequence[Option], market: Market) -> list[Order]:
                return [Order(2), Order(2, True, second_price=10.0)]

        told: list[Sequence[float]] = []

        def propose(
            model: DraftModel, requests: Sequence[DraftRequest], token_prices: Sequence[float], second_price: float
        ) -> list[Draft]:
            told.append(token_prices)
            return [Draft()] * len(requests)

        stage = Stage({"ngram": Fixed(5, 6)}, Both(), FakeReader())
        stage.step(request(0))  # the first step is plain
        stage.settle(0, [0])
        verify_s = np.array([1.0, 1.1, 1.3, 1.6, 2.0])
        monkeypatch.setattr(Prices, "market", lambda *_: Market(2, verify_s, lambda *_: 0.0))
        monkeypatch.setattr(DraftModel, "propose", propose)
        stage.step(request(0), request(1, source="model"))
        assert told == [pytest.approx([3.0, 4.0])]

    def test_no_requests(self) -> None:
        stage = Stage({"ngram": Fixed(5)})
        assert stage.plan() == []
        assert stage.speculator.draft({}) == {}
        stage.settle(0, [1])

    def test_before_any_step_was_measured_nothing_is_drafted_by_lookups(self) -> None:
        drafter = Fixed(5)
        speculator = Speculator(
            FixedLength(3), {"ngram": drafter}, None, {"ngram": Acceptance()}, Prices(StepCost(), StepCost())
        )
        assert speculator.plan([request(0)], Load(1, 1, 5, 1)) == [0]
        assert speculator.draft({}) == {}
        speculator.observe([], 1, 0.01)
        assert speculator.plan([request(0)], Load(1, 1, 5, 1)) == [1]


class TestLearning:
    def rate(self, stage: Stage, source: Source) -> float:
        return stage.acceptance[source].rates(99, [0.5])[0]

    def test_every_draft_at_hand_is_judged_bought_or_not(self) -> None:
        stage = Stage({"ngram": Fixed(5, 6), "suffix": Fixed(7, 8)}, policy=0)
        before = self.rate(stage, "ngram"), self.rate(stage, "suffix")
        for _ in range(20):
            assert stage.step(request(0)) == {}
            stage.settle(0, [5])
        assert self.rate(stage, "ngram") > before[0]
        assert self.rate(stage, "suffix") < before[1]

    def test_what_lies_beyond_the_emitted_tokens_is_not_judged(self) -> None:
        judged: list[tuple[int, int]] = []

        class Spy(Acceptance):
            def observe(self, seq_id: int, beliefs: Sequence[float], num_accepted: int, num_judged: int) -> None:
                judged.append((num_accepted, num_judged))
                super().observe(seq_id, beliefs, num_accepted, num_judged)

        stage = Stage({"ngram": Fixed(5, 6, 7)})
        stage.acceptance["ngram"] = Spy()
        for emitted in ([5], [5, 6], [5, 6, 7, 8], [5, 0], [0]):
            stage.step(request(0))
            stage.settle(0, emitted)
        assert judged == [(1, 1), (2, 2), (3, 3), (1, 2), (0, 1)]

    def test_drafters_hear_of_every_sequence(self) -> None:
        drafter = Fixed(5)
        stage = Stage({"ngram": drafter})
        stage.plan()
        stage.settle(7, [3])
        assert [verdict.seq_id for verdict in drafter.verdicts] == [7]

    def test_state_survives_json(self) -> None:
        stage = Stage({"ngram": Fixed(5)}, reader=FakeReader())
        stage.step(request(0))
        stage.settle(0, [5])
        state: Any = json.loads(json.dumps(stage.speculator.state()))
        assert set(state["acceptance"]) == {"ngram", "model"}
        assert StepCost.restore(state["prices"]["verify"]).is_known


class TestForgetting:
    @pytest.mark.parametrize("policy", [4, AdaptiveLength()])
    def test_nothing_is_tracked_once_all_have_ended(self, policy: LengthPolicy | int) -> None:
        stage = Stage({"ngram": Fixed(5)}, policy)
        for _ in range(30):
            stage.step(request(0), request(1))
            assert stage.speculator.num_tracked > 0
            stage.settle(0, [5])
        stage.speculator.forget(0)
        stage.speculator.forget(1)
        assert stage.speculator.num_tracked == 0

    def test_a_sequence_is_forgotten_by_all(self) -> None:
        drafter = Fixed(5)
        stage = Stage({"ngram": drafter}, reader=FakeReader())
        stage.step(request(0))
        stage.settle(0, [5])
        stage.speculator.forget(0)
        assert drafter.forgotten == [0]
        assert all(not one._offsets for one in stage.acceptance.values())

    def test_a_sequence_may_be_forgotten_within_a_step(self) -> None:
        stage = Stage({"ngram": Fixed(5)})
        stage.step(request(0))
        stage.speculator.forget(0)
        assert stage.speculator.num_tracked == 0
        stage.settle(0, [5])
        stage.speculator.forget(1234)

    def test_lookups_and_policy_can_be_replaced_between_two_steps(self) -> None:
        stage = Stage({"ngram": Fixed(5)})
        assert stage.step(request(0))
        stage.settle(0, [5])
        stage.speculator.policy = FixedLength(0)
        assert stage.step(request(0)) == {}
        stage.settle(0, [5])
        stage.speculator.policy, stage.speculator.lookups = FixedLength(2), {"ngram": Fixed(8, 9, 10)}
        assert stage.step(request(0))[0].draft.token_ids == (8, 9)
