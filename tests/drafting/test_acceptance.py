from __future__ import annotations

import json
import random
import time
from itertools import pairwise

import pytest

from drafting.acceptance import Acceptance


def _judge(acceptance: Acceptance, seq_id: int, beliefs: list[float], rates: list[float], rng: random.Random) -> None:
    """Have a draft verified whose tokens are right with the given probabilities."""
    num_accepted = next((i for i, rate in enumerate(rates) if rng.random() >= rate), len(rates))
    acceptance.observe(seq_id, beliefs, num_accepted, len(rates))


def _serve(acceptance: Acceptance, rate: float, num_verdicts: int, seq_ids: range = range(8)) -> None:
    rng = random.Random(0)
    for verdict in range(num_verdicts):
        _judge(acceptance, seq_ids[verdict % len(seq_ids)], [0.5] * 4, [rate] * 4, rng)


def test_an_unknown_drafter_is_given_a_chance() -> None:
    acceptance = Acceptance()
    rates = acceptance.rates(0, [0.0, 0.2, 0.5, 0.9, 1.0])
    assert all(low < high for low, high in pairwise(rates))
    assert 0.14 < rates[0] < rates[-1] < 0.86
    assert acceptance.expected(0, 3) == pytest.approx([0.6] * 3)
    assert acceptance.rates(0, []) == acceptance.expected(0, 0) == []


def test_beliefs_are_calibrated() -> None:
    rng = random.Random(0)
    acceptance = Acceptance()
    for seq_id in range(1000):
        beliefs = [rng.betavariate(3, 1) for _ in range(6)]
        _judge(acceptance, seq_id, beliefs, [belief**2 for belief in beliefs], rng)
        acceptance.forget(seq_id)
    for belief in (0.5, 0.7, 0.8, 0.9, 0.97):
        assert acceptance.rates(-1, [0.9, belief])[1] == pytest.approx(belief**2, abs=0.12)


def test_first_tokens_are_told_from_later_ones() -> None:
    rng = random.Random(0)
    acceptance = Acceptance()
    for seq_id in range(600):
        _judge(acceptance, seq_id, [0.6] * 4, [0.3, 0.9, 0.9, 0.9], rng)
    for rates in (acceptance.rates(-1, [0.6] * 4), acceptance.expected(-1, 4)):
        assert rates[0] == pytest.approx(0.3, abs=0.08)
        assert rates[1:] == pytest.approx([0.9] * 3, abs=0.08)


def test_positions_never_tried_are_as_the_last_ones_tried() -> None:
    acceptance = Acceptance()
    _serve(acceptance, 0.9, 300)
    rates = acceptance.expected(-1, 70)
    assert len(rates) == 70
    assert rates[69] == pytest.approx(rates[4]) == pytest.approx(rates[3], abs=0.01)


@pytest.mark.parametrize(("before", "after"), [(0.8, 0.2), (0.2, 0.8), (0.6, 0.95), (0.95, 0.6)])
def test_a_sequence_whose_text_changes_is_followed_within_15_verdicts(before: float, after: float) -> None:
    runs = []
    for seed in range(10):
        acceptance = Acceptance()
        _serve(acceptance, before, 600)
        rng = random.Random(seed)
        for _ in range(15):
            _judge(acceptance, 0, [0.5] * 4, [after] * 4, rng)
        runs.append((acceptance.rates(0, [0.5])[0], acceptance.expected(0, 1)[0]))
        assert acceptance.rates(-1, [0.5])[0] == pytest.approx(before, abs=0.15), "others are moved by it"
    for mean in (sum(values) / len(values) for values in zip(*runs, strict=True)):
        assert abs(mean - after) < 0.4 * abs(before - after)


def test_a_sequence_like_all_others_is_not_told_from_them() -> None:
    errors = []
    for seed in range(6):
        acceptance = Acceptance()
        _serve(acceptance, 0.6, 600)
        rng = random.Random(seed)
        for _ in range(200):
            _judge(acceptance, 0, [0.5] * 4, [0.6] * 4, rng)
            errors.append(acceptance.rates(0, [0.5])[0] - acceptance.rates(-1, [0.5])[0])
    assert (sum(error**2 for error in errors) / len(errors)) ** 0.5 < 0.085


def test_a_new_sequence_starts_at_the_drafters_rates() -> None:
    acceptance = Acceptance()
    _serve(acceptance, 0.3, 400)
    assert acceptance.rates(99, [0.5])[0] == pytest.approx(0.3, abs=0.08)
    assert acceptance.expected(99, 1)[0] == pytest.approx(0.3, abs=0.08)


def test_a_drafter_that_turns_good_is_found_out() -> None:
    acceptance = Acceptance()
    _serve(acceptance, 0.02, 1000)
    assert acceptance.rates(-1, [0.5])[0] < 0.06
    _serve(acceptance, 0.9, 600)
    assert acceptance.rates(-1, [0.5])[0] > 0.6, "two half-lives leave a quarter of the past"


def test_a_sequence_that_is_not_tried_drifts_back() -> None:
    acceptance = Acceptance()
    _serve(acceptance, 0.8, 400, range(1, 8))
    for _ in range(10):
        acceptance.observe(0, [0.5] * 4, 0, 4)
    low = acceptance.rates(0, [0.5])[0]
    for _ in range(200):
        acceptance.observe(0, [], 0, 0)
    assert low < 0.5
    assert acceptance.rates(0, [0.5])[0] == pytest.approx(acceptance.rates(99, [0.5])[0], abs=0.02)


def test_tokens_behind_a_rejection_are_not_judged() -> None:
    one, other = Acceptance(), Acceptance()
    one.observe(0, [0.5, 0.9], 0, 1)
    other.observe(0, [0.5, 0.2, 0.1], 0, 3)
    assert one.rates(1, [0.4, 0.9]) == other.rates(1, [0.4, 0.9])


def test_rates_stay_between_zero_and_one() -> None:
    acceptance = Acceptance()
    for seq_id, num_accepted in ((0, 16), (1, 0)):
        for _ in range(3000):
            acceptance.observe(seq_id, [1.0, *[0.0] * 15], num_accepted, 16)
        rates = acceptance.rates(seq_id, [0.0, 0.5, 1.0]) + acceptance.expected(seq_id, 20)
        assert all(0 < rate < 1 for rate in rates)


def test_counts_do_not_grow_for_ever() -> None:
    acceptance = Acceptance()
    _serve(acceptance, 0.7, 12_000)
    assert max(acceptance.state()["first"]["judged"]) < 500
    assert acceptance.rates(-1, [0.5])[0] == pytest.approx(0.7, abs=0.07)


def test_forgotten_sequences_leave_nothing() -> None:
    acceptance = Acceptance()
    for seq_id in range(50):
        acceptance.observe(seq_id, [0.5], 1, 1)
        acceptance.forget(seq_id)
    acceptance.forget(12345)
    assert not acceptance._offsets


def test_what_was_learnt_of_the_drafter_is_restored() -> None:
    acceptance = Acceptance()
    _serve(acceptance, 0.4, 300)
    restored = Acceptance.restore(json.loads(json.dumps(acceptance.state())))
    assert restored.rates(-1, [0.3, 0.5]) == pytest.approx(acceptance.rates(-1, [0.3, 0.5]))
    assert restored.expected(-1, 5) == pytest.approx(acceptance.expected(-1, 5))
    assert restored.rates(0, [0.5]) == restored.rates(-1, [0.5])


@pytest.mark.parametrize(
    "counts",
    [None, {}, {"accepted": [1.0], "judged": [1.0]}, {"accepted": ["a"] * 11, "judged": [1.0] * 11}]
    + [{"accepted": [a] * 11, "judged": [n] * 11} for a, n in ((2.0, 1.0), (-1.0, 1.0), (0.0, float("inf")))],
)
def test_nonsense_is_not_restored(counts: object) -> None:
    with pytest.raises(ValueError, match=r"counts|numbers"):
        Acceptance.restore(Acceptance().state() | {"later": counts})


@pytest.mark.parametrize(("num_accepted", "num_judged"), [(-1, 1), (2, 1), (0, 3)])
def test_impossible_verdicts_are_refused(num_accepted: int, num_judged: int) -> None:
    with pytest.raises(ValueError, match="drafts"):
        Acceptance().observe(0, [0.5, 0.5], num_accepted, num_judged)


def test_it_is_cheap() -> None:
    acceptance = Acceptance()
    beliefs = [0.9] * 16
    durations = []
    for _ in range(300):
        start = time.perf_counter()
        acceptance.rates(0, beliefs)
        acceptance.observe(0, beliefs, 3, 16)
        durations.append(time.perf_counter() - start)
    assert sorted(durations)[len(durations) // 10] < 150e-6
