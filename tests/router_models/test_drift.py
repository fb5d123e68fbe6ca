import numpy as np
import pytest

from router_models.drift import Drift, share_of
from router_models.router import Predictions


@pytest.mark.parametrize(("novelty", "share"), [(0.0, 0.0), (0.55, 0.0), (0.7, 0.0), (0.95, 1.0), (1.0, 1.0)])
def test_usual_traffic_is_known_and_strange_traffic_is_not(novelty: float, share: float) -> None:
    assert share_of(novelty) == pytest.approx(share)
    assert share_of(0.8) < share_of(0.9)


def test_a_strange_stream_is_noticed_within_some_hundreds_of_prompts() -> None:
    drift = Drift()
    assert drift.share == 0.0
    for _ in range(100):
        drift.observe(1.0)
    assert 0 < drift.share < 1
    for _ in range(400):
        drift.observe(1.0)
    assert drift.share > 0.9
    for _ in range(1000):
        drift.observe(0.5)
    assert drift.share == 0.0
    assert drift.mean == pytest.approx(0.5, abs=0.01)


def test_single_strange_prompts_do_not_matter() -> None:
    drift, rng = Drift(), np.random.default_rng(0)
    shares = []
    for _ in range(2000):
        drift.observe(float(rng.random() ** 0.8))
        shares.append(drift.share)
    assert max(shares) == 0.0


def test_a_window_holds_at_least_one_prompt() -> None:
    with pytest.raises(ValueError, match="window"):
        Drift(0)


def test_predictions_move_by_the_share_and_only_the_need_does() -> None:
    half = np.full((2, 2), 0.5)
    found = Predictions(half, np.ones(2), np.array([0.2, 0.4]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(found.adapted(0.5).need, [0.6, 0.2])
    assert (found.adapted(0.0).need == found.need).all()
    assert (found.adapted(1.0).need == [1.0, 0.0]).all()
    assert found.adapted(1.0).prob_right is half
    plain = Predictions(half, np.ones(2), np.array([0.2, 0.4]))
    assert plain.adapted(1.0) is plain
