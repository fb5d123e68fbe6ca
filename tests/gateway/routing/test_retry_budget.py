"""Retries are a share of the traffic, with a burst saved up."""

from gateway.routing.retry_budget import RetryBudget


def test_a_burst_then_a_share() -> None:
    budget = RetryBudget(share=0.2, burst=3)
    assert [budget.spend() for _ in range(4)] == [True, True, True, False]
    for _ in range(5):
        budget.earn()
    assert [budget.spend(), budget.spend()] == [True, False]
    assert (budget.num_retries, budget.num_refused) == (4, 2)


def test_it_does_not_grow_beyond_its_burst() -> None:
    budget = RetryBudget(share=1.0, burst=2)
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def test_nothing_is_retried_without_a_budget() -> None:
    budget = RetryBudget(share=0.0, burst=0)
    budget.earn()
    assert not budget.spend()
