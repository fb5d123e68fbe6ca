from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable

import numpy as np
import pytest

from drafting.cost import StepCost

Machine = Callable[[int, int], float]  # seconds, of tokens and cached tokens

MACHINES: dict[str, Machine] = {
    "flat": lambda tokens, kv: 0.05,
    "gpu": lambda tokens, kv: 0.002 + 7e-6 * max(tokens - 256, 0) + 2e-9 * kv,
    "cpu": lambda tokens, kv: 0.026 + 3e-4 * max(tokens - 5, 0) + 1.1e-3 * max(tokens - 16, 0) + 3e-6 * kv,
    "linear": lambda tokens, kv: 0.02 + 0.002 * (tokens - 1),
    "cliff": lambda tokens, kv: 0.02 if tokens == 1 else 0.03 + 1e-4 * tokens,
}


def _served(
    machine: Machine, num_steps: int, noise: float = 0.03, flips: bool = False, outliers: float = 0.0, unit: float = 1.0
) -> StepCost:
    """What a cost has learnt of one sequence with 0 to 8 drafts, after a first step ten times too long."""
    rng = random.Random(0)
    cost = StepCost()
    for step in range(num_steps):
        tokens, kv = 1 + rng.randrange(9), 200 + step
        seconds = unit * machine(tokens, kv) * math.exp(rng.gauss(0, noise))
        seconds *= (10 if step == 0 else 1) * (1.6 if flips and step // 50 % 2 else 1)
        cost.observe(tokens, 1, kv, seconds * (3 if rng.random() < outliers else 1))
    return cost


def _worst_ratio(cost: StepCost, machine: Machine, kv: int = 350) -> float:
    """The greatest relative error of predict(n) / predict(1), n to 9."""
    predicted = cost.predict(np.arange(1, 10), 1, kv)
    true = np.array([machine(tokens, kv) for tokens in range(1, 10)])
    return float(np.abs((predicted / predicted[0]) / (true / true[0]) - 1).max())


@pytest.mark.parametrize("name", MACHINES)
def test_ratios_are_right_after_150_steps(name: str) -> None:
    assert _worst_ratio(_served(MACHINES[name], 150), MACHINES[name]) < 0.06


@pytest.mark.parametrize("name", MACHINES)
def test_ratios_survive_a_machine_whose_speed_flips(name: str) -> None:
    assert _worst_ratio(_served(MACHINES[name], 190, flips=True), MACHINES[name]) < 0.09


@pytest.mark.parametrize("name", MACHINES)
def test_ratios_survive_steps_three_times_too_long(name: str) -> None:
    assert _worst_ratio(_served(MACHINES[name], 200, outliers=0.05), MACHINES[name]) < 0.12


def test_units_do_not_matter() -> None:
    loads = np.array([1, 5, 33, 700])
    slow, fast = (_served(MACHINES["linear"], 60, unit=unit).predict(loads, 1, 250) for unit in (50.0, 1e-3))
    np.testing.assert_allclose(slow, fast * 50e3, rtol=1e-6)


def test_a_slow_first_step_is_forgotten_at_once() -> None:
    cost = StepCost()
    cost.observe(1, 1, 50, 0.2)
    for _ in range(3):
        cost.observe(1, 1, 50, 0.02)
    assert cost.predict(1, 1, 50) == pytest.approx(0.02, rel=0.1)


def test_a_machine_that_halves_its_speed_is_followed_at_all_loads() -> None:
    cost = _served(MACHINES["linear"], 200)
    loads = np.array([1, 5, 9])
    before = cost.predict(loads, 1, 400)
    for _ in range(20):
        cost.observe(5, 1, 400, 2 * MACHINES["linear"](5, 400))
    np.testing.assert_allclose(cost.predict(loads, 1, 400), 2 * before, rtol=0.1)


def test_one_long_step_moves_little() -> None:
    cost = _served(MACHINES["linear"], 200)
    before = cost.predict(5, 1, 400)
    cost.observe(5, 1, 400, 5 * float(before))
    assert cost.predict(5, 1, 400) < 1.2 * before


def test_growing_context_is_followed() -> None:
    cost = StepCost()
    for step in range(300):
        kv = 10_000 * (1 + step)
        cost.observe(8, 8, kv, 0.01 + 5e-9 * kv)
    assert cost.predict(8, 8, 3_000_000) == pytest.approx(0.025, rel=0.05)


def test_prefills_do_not_spoil_small_loads() -> None:
    rng = random.Random(0)
    machine = MACHINES["cpu"]
    cost = StepCost()
    for step in range(300):
        tokens = rng.choice((300, 512, 4000)) if step % 4 == 0 else 1 + rng.randrange(9)
        cost.observe(tokens, 1, 350, machine(tokens, 350) * math.exp(rng.gauss(0, 0.03)))
    assert _worst_ratio(cost, machine) < 0.1
    assert cost.predict(512, 1, 350) == pytest.approx(machine(512, 350), rel=0.25)


def test_further_tokens_are_thought_cheap_until_they_are_measured() -> None:
    cost = StepCost()
    cost.observe(1, 1, 50, 0.02)
    assert cost.predict(9, 1, 50) < 1.1 * cost.predict(1, 1, 50)


def test_optimism_lowers_what_is_seldom_measured_most() -> None:
    cost = StepCost()
    for _ in range(200):
        cost.observe(1, 1, 100, 0.02)
    loads = np.array([1, 9, 65])
    sure, hopeful = cost.predict(loads, 1, 100), cost.predict(loads, 1, 100, optimism=1.0)
    assert (np.diff(hopeful) >= 0).all()
    assert (hopeful > 0).all()
    assert hopeful[0] / sure[0] > 0.9
    assert (hopeful / sure)[2] < (hopeful / sure)[1] < (hopeful / sure)[0]


def test_predictions_are_positive_and_nondecreasing_whatever_is_observed() -> None:
    rng = random.Random(1)
    cost = StepCost()
    loads = np.unique(np.geomspace(1, 8192, 60).astype(int))
    for _ in range(500):
        seqs = rng.randint(1, 512)
        cost.observe(rng.randint(seqs, 8192), seqs, rng.randint(0, 5_000_000), 10 ** rng.uniform(-6, 3))
        predicted = cost.predict(loads, seqs, 1000)
        assert np.isfinite(predicted).all()
        assert (predicted > 0).all()
        assert (np.diff(predicted) >= 0).all()


def test_a_restored_cost_predicts_the_same() -> None:
    cost = _served(MACHINES["cpu"], 100)
    restored = StepCost.restore(json.loads(json.dumps(cost.state())))
    loads = np.array([1, 4, 40, 4000])
    assert restored.is_known
    np.testing.assert_allclose(restored.predict(loads, 4, 1000), cost.predict(loads, 4, 1000))
    restored.observe(1, 1, 200, 0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"base_s": 0.0},
        {"base_s": "x"},
        {"base_s": None},
        {"per_token": [0.1]},
        {"per_token": 3},
        {"per_sequence": -1.0},
        {"per_kv_token": float("nan")},
        {"knots": [1]},
    ],
)
def test_nonsense_is_not_restored(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"state|convert"):
        StepCost.restore(StepCost().state() | change)
    with pytest.raises(ValueError, match="state"):
        StepCost.restore({})


@pytest.mark.parametrize("load", [(0, 1, 0, 1.0), (1, 0, 0, 1.0), (1, 1, -1, 1.0), (1, 1, 0, 0.0), (1, 1, 0, math.inf)])
def test_impossible_observations_are_refused(load: tuple[int, int, int, float]) -> None:
    cost = StepCost()
    with pytest.raises(ValueError, match="tokens"):
        cost.observe(*load)
    assert not cost.is_known


def test_it_is_cheap() -> None:
    cost = _served(MACHINES["cpu"], 20)
    loads = np.arange(1, 18)
    durations = []
    for _ in range(300):
        start = time.perf_counter()
        cost.observe(5, 1, 300, 0.03)
        cost.predict(loads, 1, 300)
        durations.append(time.perf_counter() - start)
    assert sorted(durations)[len(durations) // 10] < 200e-6


def _loop(machine: Machine, acceptance: float, num_seqs: int) -> tuple[float, float]:
    """Tokens per second of a buyer of 0 to 8 drafts a sequence, over the best fixed number's and over none's.

    It chooses with an optimism of 2, and takes plain steps often at first and one in 40 later.
    """
    rng = random.Random(0)
    cost = StepCost()
    emitted = np.array([num_seqs * sum(acceptance**i for i in range(drafts + 1)) for drafts in range(9)])
    loads = num_seqs * np.arange(1, 10)
    seconds = np.array([machine(int(tokens), 300 * num_seqs) for tokens in loads])
    rates = emitted / seconds
    total_tokens = total_s = 0.0
    for step in range(300):
        is_probe = step % 40 == 0 or (step < 24 and step % 3 == 0)
        hopes = cost.predict(loads, num_seqs, 300 * num_seqs, optimism=2.0)
        drafts = 0 if is_probe else int((emitted / hopes).argmax())
        cost.observe(int(loads[drafts]), num_seqs, 300 * num_seqs, seconds[drafts] * math.exp(rng.gauss(0, 0.05)))
        total_tokens += emitted[drafts]
        total_s += seconds[drafts]
    return total_tokens / total_s / rates.max(), total_tokens / total_s / rates[0]


@pytest.mark.parametrize("num_seqs", [1, 8])
@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", MACHINES)
def test_a_buyer_finds_the_best_length(name: str, acceptance: float, num_seqs: int) -> None:
    of_best, of_plain = _loop(MACHINES[name], acceptance, num_seqs)
    assert of_best > 0.94
    assert of_plain > 0.97


def _bought(machine: Machine, cost: StepCost, num_steps: int) -> list[int]:
    """Drafts a step at an acceptance of 0.5; every 20th step is plain, without which a base cannot be told apart."""
    emitted = np.array([sum(0.5**i for i in range(drafts + 1)) for drafts in range(9)])
    bought = []
    for step in range(num_steps):
        hopes = cost.predict(np.arange(1, 10), 1, 400, optimism=2.0)
        drafts = int((emitted / hopes).argmax()) if step % 20 else 0
        cost.observe(1 + drafts, 1, 400, machine(1 + drafts, 400))
        bought.append(drafts)
    return bought


def test_a_buyer_follows_a_machine_that_changes() -> None:
    cost = _served(MACHINES["flat"], 200)
    bought = _bought(lambda tokens, kv: 0.02 + 0.03 * tokens, cost, 100)
    assert bought[1] >= 3
    assert max(bought[10:]) <= bought[1] / 2, "tokens became expensive"
    assert sum(bought[80:]) / 20 < 0.5
    assert max(_bought(MACHINES["flat"], cost, 60)) >= 3, "and cheap again"
