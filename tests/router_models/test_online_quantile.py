import numpy as np
import pytest

from router_models.online_quantile import OnlineQuantile


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_the_promised_share_is_kept_on_traffic_unlike_the_prior(share: float) -> None:
    rng = np.random.default_rng(0)
    quantile = OnlineQuantile(share, prior=rng.normal(0, 1, 5000))
    strong = [quantile.decide(score) for score in rng.normal(5, 0.1, 1500)]
    assert np.mean(strong) == pytest.approx(share, abs=0.02)
    assert np.mean(strong[-500:]) == pytest.approx(share, abs=0.03)


def test_the_share_survives_a_drift() -> None:
    rng = np.random.default_rng(1)
    quantile = OnlineQuantile(0.3)
    strong = [quantile.decide(score) for score in rng.normal(np.linspace(0, 10, 4000), 1)]
    assert np.mean(strong) == pytest.approx(0.3, abs=0.02)


def test_high_scores_go_first() -> None:
    rng = np.random.default_rng(2)
    quantile, scores = OnlineQuantile(0.2), rng.random(3000)
    strong = np.array([quantile.decide(score) for score in scores])
    late = np.arange(3000) > 100
    assert scores[strong & late].min() > 0.6
    assert scores[strong].mean() > 0.85


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 200)])
def test_none_and_all_are_exact(share: float, expected: int) -> None:
    quantile = OnlineQuantile(share)
    assert sum(quantile.decide(score) for score in np.random.default_rng(3).random(200)) == expected


def test_calls_decided_elsewhere_count_towards_the_share() -> None:
    rng = np.random.default_rng(4)
    quantile, strong = OnlineQuantile(0.4), []
    for i, score in enumerate(rng.random(3000)):
        forced = i % 5 == 0
        if forced:
            quantile.observe(score, True)
        strong.append(forced or quantile.decide(score))
    assert np.mean(strong) == pytest.approx(0.4, abs=0.02)


def test_what_is_owed_is_bounded() -> None:
    quantile = OnlineQuantile(0.5)
    for _ in range(10_000):
        quantile.observe(0.0, False)
    assert quantile.owed <= 25


def test_a_share_is_between_none_and_all() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        OnlineQuantile(1.2)
