"""A ledger's totals are the sums of its open reservations, whatever order things end in."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.state.load import LoadLedger, Reservation


def reservation(replica: str, tokens: int) -> Reservation:
    return Reservation(replica, tokens + 100, tokens, prefill_rate=1.0, sent_at=0.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1000))), st.lists(st.integers(0, 50)), st.data())
def test_totals_are_the_sums_of_what_is_open(
    sent: list[tuple[str, int]], events: list[int], data: st.DataObject
) -> None:
    ledger, versions = LoadLedger(), {"a": -1, "b": -1}
    reservations = [reservation(*each) for each in sent]
    for each in reservations:
        ledger.add(each)
    for number in events:
        if reservations:
            each = reservations[number % len(reservations)]
            ledger.first_token(each, 1.0) if data.draw(st.booleans()) else ledger.end(each)
        for replica in "ab":
            totals = ledger.totals(replica)
            here = [each for each in reservations if each.replica == replica and not each.ended]
            assert totals.in_flight == len(here)
            assert totals.queued_tokens == sum(each.new_tokens for each in here if each.first_token_at is None)
            assert totals.version >= versions[replica]
            versions[replica] = totals.version
    assert {replica for replica, _ in ledger.busy()} == {each.replica for each in reservations}, "nothing was told yet"
    for replica in "ab":
        ledger.totals(replica).arrived(ledger.totals(replica).version)
    assert {replica for replica, _ in ledger.busy()} == {each.replica for each in reservations if not each.ended}


def test_what_is_expected_warm_is_the_rest_of_the_prompt() -> None:
    assert reservation("a", 30).expected_warm_tokens == 100


def test_what_is_gone_is_dropped_once_it_is_over_and_told() -> None:
    ledger = LoadLedger()
    for number in range(20):
        one = reservation(f"r{number}", 10)
        for totals in (ledger.add(one), ledger.end(one)):
            totals.arrived(totals.version)
        ledger.forget(f"r{number}")
    assert not ledger._totals
    busy = reservation("busy", 10)
    ledger.add(busy)
    ledger.forget("busy")
    assert ledger.totals("busy").in_flight == 1
    totals = ledger.end(busy)
    ledger.forget("another")
    assert dict(ledger.busy()) == {"busy": totals}, "its end is not told yet"
    totals.arrived(totals.version)
    ledger.forget("another")
    assert not ledger._totals
    assert not ledger._gone


def test_a_replica_that_comes_back_is_spoken_of_in_newer_versions() -> None:
    ledger, one = LoadLedger(), reservation("a", 10)
    ledger.add(one)
    totals = ledger.end(one)
    totals.arrived(totals.version)
    ledger.forget("a")
    assert ledger.add(reservation("a", 10)).version > totals.version
