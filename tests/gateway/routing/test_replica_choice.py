"""The choice is a function of what it is given: each part of a score, each bound, each tie."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.replica_choice import (
    Candidate,
    ChoiceWeights,
    ReplicaDecision,
    ReplicaRequest,
    choose_replica,
)

# Only expected seconds count, unless a test says otherwise.
PLAIN = ChoiceWeights(copy_weight=0, wait_weight=0, balance_weight=0, tie_band=0)


def request(tokens: int = 1000, salt: bytes = b"salt", **more: Any) -> ReplicaRequest:
    return ReplicaRequest(tokens, block_size=100, typical_s=1.0, tie_salt=salt, **more)


def candidate(replica: str, **more: Any) -> Candidate:
    return Candidate(replica, **({"queued_tokens": 0.0, "in_flight": 0, "prefill_rate": 1000.0} | more))


def choose(
    *candidates: Candidate, weights: ChoiceWeights = PLAIN, asked: ReplicaRequest | None = None
) -> ReplicaDecision:
    return choose_replica(asked or request(), candidates, weights)


def test_expected_seconds_are_queued_and_uncached_tokens_over_the_rate() -> None:
    decision = choose(
        candidate("a", queued_tokens=500.0), candidate("b", queued_tokens=900.0, predicted_tokens=600, prefill_rate=2e3)
    )
    a, b = decision.expectations
    assert (a.wait_s, a.prefill_s, a.expected_s) == pytest.approx((0.5, 1.0, 1.5))
    assert (b.wait_s, b.prefill_s, b.expected_s) == pytest.approx((0.45, 0.2, 0.65))
    assert (b.warm_tokens, b.new_tokens) == (600, 400)
    assert (decision.replica, decision.reason) == ("b", "warm")


def test_an_idle_replica_is_taken_when_the_warm_one_is_busy() -> None:
    decision = choose(candidate("warm", confirmed_tokens=900, queued_tokens=1500.0), candidate("idle"))
    assert (decision.replica, decision.reason) == ("idle", "load")


def test_a_copy_costs_more_than_its_time() -> None:
    candidates = candidate("warm", confirmed_tokens=900, queued_tokens=1500.0), candidate("idle")
    asked = request(holders=((9, 1),))
    decision = choose(*candidates, weights=dataclasses.replace(PLAIN, copy_weight=1.0), asked=asked)
    assert decision.replica == "warm"
    assert decision.expectation("idle").copied_s == pytest.approx(0.9)
    assert decision.expectation("warm").copied_s == 0


def test_what_many_hold_or_ask_for_is_copied_readily() -> None:
    candidates = candidate("warm", confirmed_tokens=900, queued_tokens=1500.0), candidate("idle")
    weights = dataclasses.replace(PLAIN, copy_weight=1.0)
    common = choose(*candidates, weights=weights, asked=request(holders=((9, 8),)))
    hot = choose(*candidates, weights=weights, asked=request(holders=((9, 1),), heat=((8, 7.0), (12, 7.0))))
    assert common.replica == hot.replica == "idle"
    assert common.expectation("idle").copied_s == pytest.approx(0.9 / 8)
    assert hot.expectation("idle").copied_s == pytest.approx(0.9 / 8)


def test_worth_is_counted_block_by_block() -> None:
    """Ten replicas hold three blocks, one of them holds nine; the first four are asked for twice as well."""
    asked = request(holders=((3, 9), (9, 1)), heat=((4, 2.0), (8, 0.0), (12, 0.0)))
    decision = choose(
        candidate("far", confirmed_tokens=900), candidate("near", confirmed_tokens=300), candidate("cold"), asked=asked
    )
    beyond = 100 / (1 + 2) + 500 / 1
    assert decision.expectation("near").copied_s == pytest.approx(beyond / 1000)
    assert decision.expectation("cold").copied_s == pytest.approx((300 / 12 + beyond) / 1000)


def test_a_long_wait_is_worse_than_its_length() -> None:
    candidates = candidate("warm", confirmed_tokens=900, queued_tokens=6000.0), candidate("idle")
    asked = request(holders=((9, 1),))
    patient = dataclasses.replace(PLAIN, copy_weight=8.0)
    assert choose(*candidates, weights=patient, asked=asked).replica == "warm"
    assert choose(*candidates, weights=dataclasses.replace(patient, wait_weight=0.5), asked=asked).replica == "idle"


def test_recent_work_weighs_against_a_replica() -> None:
    candidates = candidate("busy", recent_tokens=9000.0), candidate("spared", queued_tokens=500.0)
    assert choose(*candidates).replica == "busy"
    decision = choose(*candidates, weights=dataclasses.replace(PLAIN, balance_weight=0.2))
    assert decision.replica == "spared"
    assert decision.expectation("busy").ahead_s == pytest.approx(9.0)


def test_unknown_load_is_neither_idle_nor_lost() -> None:
    decision = choose(
        candidate("a", queued_tokens=1000.0),
        candidate("b", queued_tokens=3000.0),
        candidate("c", queued_tokens=None, in_flight=None),
    )
    assert decision.replica == "a"
    unknown = decision.expectation("c")
    assert (unknown.wait_s, unknown.load_known) == (2.0, False)


def test_an_unknown_rate_is_the_others_mean_or_the_default() -> None:
    one = choose(
        candidate("a", prefill_rate=500.0), candidate("b", prefill_rate=1500.0), candidate("c", prefill_rate=None)
    )
    assert one.expectation("c").prefill_s == pytest.approx(1.0)
    assert not one.expectation("c").rate_known
    none = choose(candidate("a", prefill_rate=None), weights=dataclasses.replace(PLAIN, default_prefill_rate=100.0))
    assert none.expectation("a").prefill_s == pytest.approx(10.0)


def test_kv_use_and_decoding_take_time() -> None:
    decision = choose(candidate("a", kv_use=0.9), candidate("b", in_flight=10, decode_rate=100.0))
    assert decision.expectation("a").pressure_s == pytest.approx(0.15 * 9)
    assert decision.expectation("b").decode_s == pytest.approx(0.1)


def test_bounds_set_replicas_aside_while_others_are_left() -> None:
    flooded = [
        candidate("warm", confirmed_tokens=900, in_flight=100),
        *(candidate(f"r{n}", in_flight=1) for n in range(7)),
    ]
    decision = choose(*flooded)
    assert decision.replica != "warm"
    assert decision.expectation("warm").set_aside == "in flight"
    worked = [candidate("warm", confirmed_tokens=900, recent_tokens=1e5), *(candidate(f"r{n}") for n in range(7))]
    assert choose(*worked).expectation("warm").set_aside == "recent work"
    full = choose(candidate("warm", confirmed_tokens=900, kv_use=0.97), candidate("b", queued_tokens=5000.0))
    assert full.replica == "b"
    assert choose(candidate("only", kv_use=0.97)).replica == "only"


def test_draining_replicas_are_a_last_resort() -> None:
    draining = candidate("leaving", confirmed_tokens=900, draining=True)
    assert choose(draining, candidate("b", queued_tokens=9000.0, kv_use=0.99)).replica == "b"
    last = choose(draining)
    assert (last.replica, last.reason) == ("leaving", "fallback")
    none = choose()
    assert (none.replica, none.reason) == (None, "none")


def test_trust_scales_what_a_replica_promises() -> None:
    decision = choose(candidate("liar", confirmed_tokens=900, trust=0.5), candidate("honest", confirmed_tokens=500))
    assert decision.expectation("liar").warm_tokens == 400  # whole blocks
    assert decision.replica == "honest"
    assert choose(candidate("a", confirmed_tokens=900, trust=0.95)).expectation("a").warm_tokens == 900


def test_the_last_token_is_always_computed() -> None:
    decision = choose(candidate("a", confirmed_tokens=1000))
    assert decision.expectation("a").warm_tokens == 900
    assert decision.expectation("a").new_tokens == 100


def test_ties_are_spread_by_salt_and_equal_for_one() -> None:
    candidates = [candidate(f"r{number}") for number in range(4)]
    counts = Counter(choose(*candidates, asked=request(salt=str(n).encode())).replica for n in range(400))
    assert set(counts) == {each.replica for each in candidates}
    assert max(counts.values()) < 150
    assert {choose(*order, asked=request(salt=b"x")).replica for order in (candidates, candidates[::-1])} == {
        choose(*candidates, asked=request(salt=b"x")).replica
    }


def test_losing_a_replica_moves_only_its_ties() -> None:
    candidates = [candidate(f"r{number}") for number in range(5)]
    for number in range(50):
        asked = request(salt=str(number).encode())
        before = choose(*candidates, asked=asked).replica
        after = choose(*candidates[:4], asked=asked).replica
        assert after == before or before == "r4"


_candidates = st.lists(
    st.builds(
        Candidate,
        replica=st.uuids().map(str),
        confirmed_tokens=st.integers(0, 2000),
        predicted_tokens=st.integers(0, 2000),
        queued_tokens=st.none() | st.floats(0, 1e6),
        in_flight=st.none() | st.integers(0, 500),
        recent_tokens=st.floats(0, 1e6),
        prefill_rate=st.none() | st.floats(1, 1e5),
        decode_rate=st.none() | st.floats(1, 1e4),
        kv_use=st.none() | st.floats(0, 1),
        trust=st.floats(0, 1),
        draining=st.booleans(),
        silent=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.replica,
)


@given(_candidates, st.lists(st.tuples(st.integers(1, 20), st.integers(1, 64)), unique_by=lambda pair: pair[0]))
def test_whatever_is_known_a_replica_is_found(candidates: list[Candidate], holders: list[tuple[int, int]]) -> None:
    decision = choose_replica(request(holders=tuple(sorted(holders))), candidates)
    replicas = {each.replica for each in candidates}
    assert (decision.replica in replicas) if replicas else decision.replica is None
    assert [each.replica for each in decision.expectations] == [each.replica for each in candidates]
    for each in decision.expectations:
        assert each.expected_s > 0
        assert each.copied_s >= 0
        assert each.ahead_s >= 0
        assert each.score >= each.expected_s
    pool = [each for each in decision.expectations if each.set_aside is None]
    if pool:
        assert decision.expectation(decision.replica or "").score <= min(each.score for each in pool) * 1.0101


def test_a_session_stays_where_it_was_while_that_costs_little() -> None:
    asked = request(pinned="home")
    near, far = candidate("home", queued_tokens=90.0), candidate("home", queued_tokens=110.0)
    assert choose(near, candidate("idle"), asked=asked).replica == "home"
    assert choose(far, candidate("idle"), asked=asked).replica == "idle"
    assert choose(near, candidate("idle")).replica == "idle", "of no session"
    assert choose(candidate("home", draining=True), candidate("idle"), asked=asked).replica == "idle"
    assert choose(candidate("idle"), asked=asked).replica == "idle", "its replica is gone"


def test_an_unknown_load_is_a_usual_one() -> None:
    """Neither idle nor lost: it stands between the replicas that are known."""
    unknown = candidate("unknown", queued_tokens=None, in_flight=None, kv_use=None, decode_rate=10.0)
    calm = candidate("calm", in_flight=2, kv_use=0.1, decode_rate=10.0)
    busy = candidate("busy", in_flight=20, kv_use=0.9, decode_rate=10.0)
    found = {each.replica: each.expected_s for each in choose(unknown, calm, busy).expectations}
    assert found["calm"] < found["unknown"] < found["busy"]


def test_a_replica_that_fell_silent_comes_last() -> None:
    silent = candidate("silent", silent=True)
    assert choose(silent, candidate("busy", queued_tokens=5000.0)).replica == "busy"
    assert choose(silent, candidate("leaves", draining=True)).replica is not None
    assert choose(silent).replica == "silent"


@pytest.mark.parametrize(("loaded", "bound"), [("in_flight", 16), ("recent_tokens", 20_000.0)])
def test_a_silent_replica_serves_before_the_others_drown(loaded: str, bound: float) -> None:
    def decide(silent_load: float, load: float) -> ReplicaDecision:
        others = [candidate(f"r{number}", **{loaded: load}, decode_rate=100.0) for number in range(7)]
        silent = candidate("silent", silent=True, **{loaded: silent_load}, decode_rate=100.0)
        return choose(silent, *others, weights=dataclasses.replace(PLAIN, balance_weight=0.2))

    calm, drowning = decide(0, bound), decide(0, bound + 1)
    assert (calm.replica != "silent", calm.expectation("silent").set_aside) == (True, "silent")
    assert (drowning.replica, drowning.reason) == ("silent", "cold")
    assert decide(bound, bound + 1).replica != "silent", "it has about as much to do"
    assert decide(50 * bound, bound + 1).expectation("silent").set_aside in ("in flight", "recent work")


def test_a_silent_replica_is_spared_by_none_that_is_set_aside_itself() -> None:
    silent = candidate("silent", silent=True)
    assert choose(silent, candidate("full", kv_use=0.99), candidate("leaves", draining=True)).replica == "silent"
