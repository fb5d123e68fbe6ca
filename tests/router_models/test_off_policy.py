import numpy as np
import pytest

from router_models.errors import DataError
from router_models.off_policy import Logged, doubly_robust, ips, predict_results

_ROWS, _RUNS = 3000, 300


def _run(seed: int, size: int = _ROWS) -> tuple[Logged, np.ndarray, np.ndarray, float]:
    """A log of a policy that explores 5 %, another policy, features, and that one's true value on these rows."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size, 2))
    means = 1 / (1 + np.exp(-np.column_stack([features[:, 0] - 0.5, features[:, 0] + 0.5])))
    logging = np.where((features[:, 1] > 0)[:, None], [0.025, 0.975], [0.975, 0.025])
    action = (rng.random(size) < logging[:, 1]).astype(np.intp)
    result = (rng.random(size) < means[np.arange(size), action]).astype(float)
    target = np.where((features[:, 0] > 0)[:, None], [0.0, 1.0], [1.0, 0.0])
    log = Logged(action, logging[np.arange(size), action], result)
    return log, target, features, float(np.mean(np.sum(target * means, axis=1)))


@pytest.mark.parametrize("method", ["ips", "doubly_robust"])
@pytest.mark.parametrize(("size", "share", "width"), [(_ROWS, 0.9, 0.25), (100, 0.8, 1.0)])
def test_intervals_cover_the_truth_as_often_as_they_promise(method: str, size: int, share: float, width: float) -> None:
    """Of a hundred rows two or three have nearly all of the weight, and intervals keep less than they promise."""
    covered, widths = 0, []
    for seed in range(_RUNS):
        log, target, features, truth = _run(seed, size)
        found = ips(log, target) if method == "ips" else doubly_robust(log, target, predict_results(log, features, 2))
        covered += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert covered >= share * _RUNS, covered
    assert np.mean(widths) < width


def test_a_model_of_the_results_narrows_the_interval() -> None:
    log, target, features, _ = _run(0)
    plain, modelled = ips(log, target), doubly_robust(log, target, predict_results(log, features, 2))
    assert modelled.high - modelled.low < plain.high - plain.low


def test_the_interval_of_a_plain_mean_is_students() -> None:
    result = np.random.default_rng(0).random(8)
    log, everywhere = Logged(np.zeros(8, np.intp), np.ones(8), result), np.ones((8, 1))
    half = 1.8945786 * result.std(ddof=1) / np.sqrt(8)  # t with 7 degrees of freedom
    for found in (ips(log, everywhere), doubly_robust(log, everywhere, np.zeros((8, 1)))):
        assert (found.low, found.high) == pytest.approx((result.mean() - half, result.mean() + half))


def test_the_logging_policy_itself_is_worth_its_mean_result() -> None:
    log, _, _, _ = _run(1)
    always = np.zeros((_ROWS, 2))
    always[np.arange(_ROWS), log.action] = log.propensity
    same = ips(Logged(log.action, log.propensity, log.result), always)
    assert same.value == pytest.approx(log.result.mean())
    assert same.effective_rows == pytest.approx(_ROWS)


def test_actions_that_the_log_never_takes_are_refused() -> None:
    log = Logged(np.zeros(4, np.intp), np.ones(4), np.ones(4))
    with pytest.raises(DataError, match="never takes action 1"):
        ips(log, np.full((4, 2), 0.5))


def test_rows_that_could_not_have_gone_otherwise_are_refused() -> None:
    """Both actions are taken somewhere, each where the other one never is."""
    log, target = Logged(np.array([0, 0, 1, 1]), np.array([1.0, 1.0, 1.0, 0.5]), np.ones(4)), np.eye(2)[[0, 1, 1, 0]]
    for estimate in (ips, lambda *args: doubly_robust(*args, np.zeros((4, 2)))):
        with pytest.raises(DataError, match="1 of 4 rows the log had no chance"):
            estimate(log, target)
    assert ips(log, np.eye(2)[[0, 0, 1, 1]]).value == 1.0


def test_a_policy_that_no_row_follows_is_refused() -> None:
    log = Logged(np.array([0, 1]), np.array([0.9, 0.9]), np.ones(2))
    for actions in ([1, 0], [0, 0]):
        with pytest.raises(DataError, match="fewer than two rows of the log did"):
            ips(log, np.eye(2)[actions])


def test_propensities_have_to_be_probabilities() -> None:
    with pytest.raises(DataError, match="propensity"):
        Logged(np.zeros(1, np.intp), np.zeros(1), np.ones(1))
    with pytest.raises(DataError, match="no rows"):
        Logged(np.zeros(0, np.intp), np.zeros(0), np.zeros(0))


def test_predictions_for_a_row_do_not_see_its_own_result() -> None:
    log, _, features, _ = _run(2)
    before = predict_results(log, features, 2)
    flipped = log.result.copy()
    flipped[7] = 1 - flipped[7]
    after = predict_results(Logged(log.action, log.propensity, flipped), features, 2)
    assert (before[7] == after[7]).all()
    assert not (before == after).all()
