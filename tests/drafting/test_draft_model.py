"""Who reads what, and when to stop, over a reader that remembers what it was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.draft_model import DraftModel, Guess, Reading
from drafting.protocol import Draft, DraftRequest


class FakeReader:
    """Guesses the number of tokens before the guess, with a belief of its choosing; insists on contiguous reading."""

    def __init__(self, max_position: int = 1000, belief: float = 0.9) -> None:
        self.max_position = max_position
        self.memory: dict[int, int] = {}  # sequence -> leading tokens read
        self.calls: list[list[Reading]] = []
        self._belief = belief
        self._within: dict[int, int] = {}

    def num_read(self, seq_id: int) -> int:
        return self.memory.get(seq_id, 0)

    def read(self, readings: Sequence[Reading]) -> list[Guess | None]:
        self.calls.append(list(readings))
        assert len({one.seq_id for one in readings}) == len(readings)
        for one in readings:
            assert one.start == self._within.get(one.seq_id, self.num_read(one.seq_id)), "a gap, or read twice"
            assert one.num_tokens > 0
            assert one.stop <= self.max_position
            self._within[one.seq_id] = one.stop
        return [Guess(one.stop, self._belief) if one.guesses else None for one in readings]

    def settle(self, seq_id: int, num_read: int) -> None:
        self.memory[seq_id] = self._within[seq_id] = num_read


def request(seq_id: int, num_tokens: int, max_drafts: int = 3) -> DraftRequest:
    return DraftRequest(seq_id, list(range(num_tokens)), 1, max_drafts)


def model(reader: FakeReader, max_reading_tokens: int = 512) -> DraftModel:
    return DraftModel(reader, Acceptance(), StepCost(), max_reading_tokens)


def test_all_unread_tokens_are_read_once_and_then_one_guess_after_another() -> None:
    reader = FakeReader()
    (draft,) = model(reader).propose([request(0, 5)])
    assert draft == Draft((5, 6, 7), (0.9,) * 3)
    assert [(one.start, one.stop, one.drafts) for (one,) in reader.calls] == [(0, 5, ()), (5, 6, (5,)), (6, 7, (5, 6))]


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_a_lag_is_made_up_for_in_the_first_round(lag: int) -> None:
    reader = FakeReader()
    reader.settle(0, 10 - lag)
    assert model(reader).num_unread(request(0, 10)) == lag
    model(reader).propose([request(0, 10, max_drafts=2)])
    assert [one.num_tokens for (one,) in reader.calls] == [lag, 1]


def test_sequences_are_read_together_and_drop_out_as_they_are_done() -> None:
    reader = FakeReader()
    requests = [request(0, 5, 1), request(1, 7, 3), request(2, 3, 2)]
    drafts = model(reader).propose(requests)
    assert [draft.token_ids for draft in drafts] == [(5,), (7, 8, 9), (3, 4)], "in the order of the requests"
    assert [sorted(one.seq_id for one in call) for call in reader.calls] == [[0, 1, 2], [1, 2], [1]]


def test_nothing_is_read_for_whom_there_is_no_room() -> None:
    reader = FakeReader(max_position=6)
    asked = [request(0, 6), request(1, 9), request(2, 4, 0), request(3, 4, 5)]
    assert [model(reader).room(one) for one in asked] == [0, 0, 0, 2]
    assert [draft.token_ids for draft in model(reader).propose(asked)] == [(), (), (), (4, 5)]
    assert {one.seq_id for call in reader.calls for one in call} == {3}


class SteadyCost(StepCost):
    """Any forward takes as long, whatever was observed."""

    is_known = True

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def predict(
        self, num_tokens: npt.ArrayLike, num_seqs: int, num_kv_tokens: int, optimism: float = 0.0
    ) -> npt.NDArray[np.float64]:
        return np.full(np.shape(num_tokens), self._seconds)


def length(token_price: float = 0.0, second_price: float = 0.0, num_seqs: int = 1, round_s: float = 0.1) -> int:
    """Of the drafts of a model that nothing is known of but its speed, and whose guesses are worth about a half."""
    drafter = DraftModel(FakeReader(belief=0.5), Acceptance(), SteadyCost(round_s))
    drafts = drafter.propose([request(i, 4, 20) for i in range(num_seqs)], [token_price], second_price)
    (count,) = {len(draft.token_ids) for draft in drafts}
    return count


def test_a_draft_ends_where_a_token_brings_less_than_its_verification() -> None:
    assert length() == 20
    assert 20 > length(token_price=0.01) > length(token_price=0.1) > length(token_price=0.4) >= 1


def test_where_drafts_end_early_further_tokens_are_as_cheap_as_the_first() -> None:
    drafter = DraftModel(FakeReader(belief=0.5), Acceptance(), SteadyCost(0.1))
    free, dear = [0.0] * 12, [0.9] * 12
    drafts = drafter.propose([request(i, 4, 20) for i in range(4)], free + dear)
    assert [len(draft.token_ids) for draft in drafts] == [3] * 4


def test_a_round_has_to_pay_for_itself() -> None:
    assert 20 > length(second_price=0.1) > length(second_price=1.0) > length(second_price=4.0) >= 1
    assert length(second_price=1.0, round_s=0.01) > length(second_price=1.0, round_s=0.1)


def test_sequences_share_the_price_of_a_round() -> None:
    assert length(second_price=4.0, num_seqs=16) > length(second_price=4.0)


def test_a_long_unread_stretch_is_caught_up_on_over_several_calls() -> None:
    reader = FakeReader()
    reader.settle(0, 98)
    drafter = model(reader, max_reading_tokens=30)
    for turn in range(4):
        reader.calls.clear()
        drafts = drafter.propose([request(1, 100), request(0, 100)])
        assert drafts[1].token_ids, "those that lag little are not kept waiting"
        assert max(sum(one.num_tokens for one in call) for call in reader.calls) <= 30
        assert bool(drafts[0].token_ids) == (turn == 3)
        reader.settle(0, 98)
        reader.settle(1, min(reader._within[1], 99))


def test_the_budget_is_one_for_all_sequences() -> None:
    reader = FakeReader()
    model(reader, max_reading_tokens=10).propose([request(seq_id, 8) for seq_id in range(4)])
    first = [one for call in reader.calls[:2] for one in call if one.start == 0]
    assert sum(one.num_tokens for one in first) == 10


def test_a_lag_of_two_is_always_within_the_budget() -> None:
    reader = FakeReader()
    for seq_id in range(20):
        reader.settle(seq_id, 8)
    drafts = model(reader, max_reading_tokens=4).propose([request(seq_id, 10) for seq_id in range(20)])
    assert all(len(draft.token_ids) == 3 for draft in drafts)


def test_costs_are_learnt_from_its_forwards() -> None:
    cost = StepCost()
    DraftModel(FakeReader(), Acceptance(), cost).propose([request(0, 5)])
    assert cost.is_known


def test_no_requests() -> None:
    reader = FakeReader()
    assert model(reader).propose([]) == []
    assert reader.calls == []
