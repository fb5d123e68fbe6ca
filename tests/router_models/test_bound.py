import numpy as np

from router_models.bound import threshold_for_loss
from router_models.metrics import Pair


def _draw(size: int, seed: int) -> tuple[np.ndarray, Pair]:
    rng = np.random.default_rng(seed)
    gap = rng.random(size) * 0.4
    weak = rng.random(size) * 0.5
    strong_results = (rng.random(size) < weak + gap).astype(float)
    return gap, Pair(strong_results, (rng.random(size) < weak).astype(float))


def test_the_bound_holds_as_often_as_promised() -> None:
    broken = 0
    for seed in range(200):
        need, pair = _draw(800, seed)
        threshold = threshold_for_loss(need, pair, max_loss=0.05, confidence=0.9)
        # The true mean loss below a threshold of uniform gaps on [0, 0.4].
        broken += min(max(threshold, 0), 0.4) ** 2 / 0.8 > 0.05
    assert broken <= 28


def test_a_looser_bound_sends_fewer_to_the_strong_model() -> None:
    need, pair = _draw(3000, 0)
    found = [threshold_for_loss(need, pair, loss, 0.95) for loss in (0.0, 0.02, 0.08, 1.0)]
    assert found == sorted(found)
    assert found[0] == float("-inf")
    assert found[-1] == need.max()


def test_few_rows_prove_nothing() -> None:
    need, pair = _draw(20, 0)
    assert threshold_for_loss(need, pair, 0.5, 0.95) == float("-inf")
