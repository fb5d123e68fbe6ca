"""Who else sends: told apart from our own requests, those on their way included."""

from gateway.state.company import Company
from gateway.state.fleet_view import ReplicaState


def look(company: Company, sends: int, now: float, replica: str = "r") -> None:
    company.look([ReplicaState(replica, leased=True, sends=sends)], now)


def settled(sends: int = 7) -> Company:
    company = Company()
    look(company, sends, 0.0)
    return company


def test_a_gateway_looks_around_before_it_believes_to_be_alone() -> None:
    company = Company()
    assert not company.is_alone(100.0)
    look(company, 7, 100.0)
    assert not company.is_alone(102.9)
    assert company.is_alone(103.0)


def test_own_requests_are_no_company() -> None:
    company = settled()
    for number in range(20):
        company.sending("r")
        assert company.sends("r") == 8 + number
        look(company, 7 + number, 4.0)  # asked before Redis had counted it
        company.sent("r", True)
        look(company, 8 + number, 4.0)
        assert company.is_alone(4.0)


def test_what_is_counted_but_not_yet_confirmed_may_be_our_own() -> None:
    """The first use of a script takes a second trip, which a look may overtake."""
    company = settled()
    company.sending("r")
    look(company, 8, 5.0)
    assert company.is_alone(5.0)
    company.sent("r", True)
    look(company, 8, 5.0)
    assert company.is_alone(5.0)
    company.sending("r")
    look(company, 9, 5.0)  # another one's: ours was not counted yet
    company.sent("r", True)
    look(company, 10, 6.0)
    assert not company.is_alone(6.0)


def test_a_request_of_another_is_noticed_and_remembered_for_a_while() -> None:
    company = settled()
    company.sending("r")
    company.sent("r", True)
    look(company, 9, 10.0)
    assert not company.is_alone(69.9)
    assert company.is_alone(70.0)
    assert company.sends("r") == 9


def test_a_request_that_was_not_counted_is_taken_back() -> None:
    company = settled()
    company.sending("r")
    company.sent("r", False)
    look(company, 7, 5.0)
    assert company.sends("r") == 7
    assert company.is_alone(5.0)


def test_a_replica_seen_late_was_not_sent_anything_just_now() -> None:
    company = settled()
    look(company, 500, 5.0, "another")
    assert company.is_alone(5.0)


def test_records_that_were_lost_count_anew() -> None:
    company = settled(1000)
    look(company, 2, 5.0)
    assert company.sends("r") == 2
    look(company, 3, 6.0)
    assert not company.is_alone(6.0)


def test_a_replica_that_is_gone_is_forgotten_unless_something_is_on_its_way() -> None:
    company = settled()
    company.sending("r")
    company.forget("r")
    company.sent("r", True)
    assert company.sends("r") == 8
    company.forget("r")
    assert company.sends("r") == 0


def test_what_redis_may_have_counted_is_no_company() -> None:
    """A claim whose answer came too late."""
    company = settled()
    for number in range(3):
        company.sending("r")
        company.sent("r", None)
        look(company, 8 + number, 5.0)
        assert company.is_alone(5.0)
        assert company.sends("r") == 8 + number
    look(company, 11, 5.0)
    assert not company.is_alone(5.0), "this one was not ours"
