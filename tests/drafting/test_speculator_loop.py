"""The whole loop on a simulated machine: estimates, purchase, pace. Time is computed, so figures are exact.

A drafter at hand is right with a probability that the speculator has to find out, and a step takes what the machine
says. Speed is emitted tokens per simulated second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.draft_length import AdaptiveLength, FixedLength, LengthPolicy
from drafting.prices import Load, Prices
from drafting.protocol import Draft, DraftRequest, Verdict
from drafting.speculator import Speculator

Machine = Callable[[int, int], float]  # tokens, sequences -> seconds
CONTEXT = 200
MAX_DRAFTS = 8
WRONG = -1


def memory_bound(num_tokens: int, num_seqs: int) -> float:
    """Weights are read once; beyond 24 tokens arithmetic counts: a CPU, or a small GPU."""
    return 0.050 + 0.0008 * num_tokens + 0.002 * max(0, num_tokens - 24) + 0.0005 * num_seqs


def compute_bound(num_tokens: int, num_seqs: int) -> float:
    """Every token costs half of what a step costs at least."""
    return 0.010 + 0.005 * num_tokens


class Luck:
    """Right with probability `rate`, token by token; it believes a little more in what is right."""

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = rate
        self.num_asked = 0
        self._random = random.Random(seed)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See Drafter. Token i of the true text is i."""
        return [self._draft(request) for request in requests]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """See Drafter."""

    def forget(self, seq_id: int) -> None:
        """See Drafter."""

    def _draft(self, request: DraftRequest) -> Draft:
        self.num_asked += 1
        start = len(request.token_ids)
        right = [self._random.random() < self.rate for _ in range(request.max_drafts)]
        beliefs = tuple(self._random.uniform(0.3, 0.8) + 0.1 * is_right for is_right in right)
        return Draft(tuple(start + i if is_right else WRONG for i, is_right in enumerate(right)), beliefs)


class Simulation:
    """A batch that decodes for ever; `rate`, `machine` and `policy` may be changed under way.

    A step in which drafts are looked for takes `looking_s` longer.
    """

    looking_s = 0.0

    def __init__(self, policy: LengthPolicy, machine: Machine, rate: float, num_seqs: int) -> None:
        self.luck = Luck(rate)
        self.machine = machine
        self.num_seqs = num_seqs
        self._texts = [list(range(CONTEXT)) for _ in range(64)]
        prices = Prices(StepCost(), StepCost())
        self._speculator = Speculator(policy, {"ngram": self.luck}, None, {"ngram": Acceptance()}, prices)
        self._noise = random.Random(1)

    def set_policy(self, policy: LengthPolicy) -> None:
        self._speculator.policy = policy

    def run(self, num_steps: int) -> float:
        """Tokens per second."""
        emitted, elapsed_s = 0, 0.0
        for _ in range(num_steps):
            tokens, seconds = self.step()
            emitted += tokens
            elapsed_s += seconds
        return emitted / elapsed_s

    def step(self) -> tuple[int, float]:
        """Tokens emitted, and seconds."""
        texts = self._texts[: self.num_seqs]
        requests = [DraftRequest(i, text, CONTEXT, MAX_DRAFTS) for i, text in enumerate(texts)]
        load = Load(len(texts), len(texts), sum(map(len, texts)), len(texts))
        num_asked = self.luck.num_asked
        wanted = self._speculator.plan(requests, load)
        drafting_s = self.looking_s if self.luck.num_asked > num_asked else 0.0
        chosen = self._speculator.draft({i: count for i, count in enumerate(wanted) if count})
        verdicts = []
        for i, text in enumerate(texts):
            draft = chosen[i].draft if i in chosen else Draft()
            truth = range(len(text), len(text) + len(draft.token_ids))
            agrees = [a == b for a, b in zip(draft.token_ids, truth, strict=True)]
            num_accepted = agrees.index(False) if False in agrees else len(agrees)
            text.extend(range(len(text), len(text) + num_accepted + 1))
            verdicts.append(Verdict(i, text, CONTEXT, num_accepted + 1, draft, "ngram", num_accepted))
        num_tokens = len(texts) + sum(len(one.draft.token_ids) for one in chosen.values())
        seconds = self.machine(num_tokens, len(texts)) * self._noise.lognormvariate(0, 0.02)
        self._speculator.observe(verdicts, num_tokens, seconds, drafting_s)
        return sum(verdict.num_new for verdict in verdicts), seconds + drafting_s


def fixed(machine: Machine, rate: float, num_seqs: int, length: int) -> float:
    return Simulation(FixedLength(length), machine, rate, num_seqs).run(150)


@pytest.mark.parametrize("num_seqs", [1, 24])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("machine", [memory_bound, compute_bound])
def test_never_slower_than_plain_and_near_the_best_fixed_length(machine: Machine, rate: float, num_seqs: int) -> None:
    """Over 400 steps from a cold start, plain steps for measurement included."""
    adaptive = Simulation(AdaptiveLength(), machine, rate, num_seqs).run(400)
    plain = fixed(machine, rate, num_seqs, 0)
    best = max(fixed(machine, rate, num_seqs, length) for length in (1, 2, 3, 4, 6, 8))
    assert adaptive >= 0.97 * plain
    assert adaptive >= 0.95 * best


def test_a_first_step_of_drafts_for_a_large_batch_is_no_longer_than_two() -> None:
    """Nothing is known of its cost yet; each step may then double what was verified before."""
    simulation = Simulation(AdaptiveLength(), compute_bound, 0.5, 24)
    plain_s = compute_bound(24, 24)
    took_s = [simulation.step()[1] / plain_s for _ in range(12)]
    assert max(took_s[:3]) < 2.2
    assert max(took_s) < 4.4


def test_a_single_sequence_has_long_drafts_within_some_steps() -> None:
    simulation = Simulation(AdaptiveLength(), memory_bound, 0.97, 1)
    assert max(simulation.step()[0] for _ in range(12)) > 6


def test_steps_of_a_fixed_length_use_up_no_rest_of_an_adaptive_one() -> None:
    simulation = Simulation(AdaptiveLength(), compute_bound, 0.5, 24)
    simulation.looking_s = 0.1 * compute_bound(24, 24)
    simulation.run(120)  # of which the last long rest has used up a few
    simulation.set_policy(FixedLength(1))
    simulation.run(100)
    simulation.set_policy(AdaptiveLength())
    num_asked = simulation.luck.num_asked
    simulation.run(20)
    assert simulation.luck.num_asked == num_asked


def test_a_batch_that_fills_up_stops_speculation_at_once() -> None:
    """Loads differ in price, and prices are known, so nothing has to be found out again."""
    simulation = Simulation(AdaptiveLength(), compute_bound, 0.6, 1)
    simulation.num_seqs = 32
    simulation.run(60)
    simulation.num_seqs = 1
    simulation.run(100)
    simulation.num_seqs = 32
    assert simulation.run(20) >= 0.97 * fixed(compute_bound, 0.6, 32, 0)


def test_a_batch_that_drains_starts_speculation_within_tens_of_steps() -> None:
    simulation = Simulation(AdaptiveLength(), memory_bound, 0.8, 32)
    simulation.run(200)
    simulation.num_seqs = 1
    simulation.run(20)
    assert simulation.run(100) >= 0.9 * max(fixed(memory_bound, 0.8, 1, length) for length in (4, 8))


def test_text_that_becomes_predictable_is_noticed_within_tens_of_steps() -> None:
    simulation = Simulation(AdaptiveLength(), memory_bound, 0.02, 1)
    simulation.run(300)
    simulation.luck.rate = 0.9
    simulation.run(30)
    assert simulation.run(40) >= 0.85 * fixed(memory_bound, 0.9, 1, 8)


def test_text_that_becomes_unpredictable_is_noticed_within_tens_of_steps() -> None:
    simulation = Simulation(AdaptiveLength(), compute_bound, 0.97, 1)
    simulation.run(300)
    simulation.luck.rate = 0.02
    simulation.run(30)
    assert simulation.run(60) >= 0.95 * fixed(compute_bound, 0.02, 1, 0)


def test_a_machine_that_slows_down_as_a_whole_changes_nothing() -> None:
    simulation = Simulation(AdaptiveLength(), memory_bound, 0.8, 4)
    fast = simulation.run(200)
    simulation.machine = lambda num_tokens, num_seqs: 1.6 * memory_bound(num_tokens, num_seqs)
    simulation.run(20)
    assert simulation.run(100) * 1.6 >= 0.95 * fast
