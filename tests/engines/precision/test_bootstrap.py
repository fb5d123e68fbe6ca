from __future__ import annotations

import random

import pytest

from engines.precision.bootstrap import relative_increase


def test_the_estimate_is_the_ratio_of_sums() -> None:
    found = relative_increase([(1.0, 2.0), (3.0, 3.0)], 0.95)
    assert found.estimate == pytest.approx(5 / 4 - 1)
    assert (found.low, found.high) == pytest.approx((0.0, 1.0)), "two rows can be drawn as either one twice"


def test_no_spread_without_a_difference_between_rows() -> None:
    found = relative_increase([(float(i), 1.02 * i) for i in range(1, 50)], 0.95)
    assert (found.low, found.estimate, found.high) == pytest.approx((0.02, 0.02, 0.02)), "how hard a row is cancels"


def test_is_the_same_every_time() -> None:
    rows = [(1.0 + i % 7, 1.0 + i % 5) for i in range(40)]
    assert relative_increase(rows, 0.9) == relative_increase(rows, 0.9)


def test_more_confidence_is_a_wider_interval_and_more_rows_a_narrower_one() -> None:
    draw = random.Random(0)
    rows = [(10.0, 10.0 + draw.gauss(0, 1)) for _ in range(400)]
    few, many, sure = relative_increase(rows[:40], 0.9), relative_increase(rows, 0.9), relative_increase(rows, 0.99)
    assert sure.low < many.low < many.high < sure.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_resamples_are_drawn_in_batches_without_losing_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.precision.bootstrap._BATCH_VALUES", 70)
    found = relative_increase([(1.0, 1.0 + i / 100) for i in range(30)], 0.95, num_resamples=501)
    assert found.estimate == pytest.approx(0.145)
    assert found.low < 0.145 < found.high


@pytest.mark.parametrize("num_rows", [30, 100])
def test_covers_the_truth_about_as_often_as_it_says(num_rows: int) -> None:
    draw = random.Random(1)
    inside = 0
    for _ in range(200):
        hardness = [draw.lognormvariate(3, 0.7) for _ in range(num_rows)]
        rows = [(nats, nats * (1.01 + draw.gauss(0, 0.02))) for nats in hardness]
        found = relative_increase(rows, 0.9, num_resamples=400)
        inside += found.low <= 0.01 <= found.high
    assert 0.80 <= inside / 200 <= 0.97
