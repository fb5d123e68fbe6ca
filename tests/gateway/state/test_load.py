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
