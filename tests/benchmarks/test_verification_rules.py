"""Survival along the target's text equals what the rules, run draft by draft, accept; and they lose nothing."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.verification_rules import block_survival, chain_survival, count_steps, ratio_of_sums
from drafting.noise import noise
from drafting.verify import accepted_prefix

VOCAB = 3
Path = tuple[int, ...]
Law = Callable[[Path], list[float]]


def _law(seed: int, sharpness: float) -> Law:
    """A law of the next token that depends on all tokens before."""

    def law(history: Path) -> list[float]:
        generator = random.Random(f"{seed}{history}")
        weights = [math.exp(generator.gauss(0, sharpness)) for _ in range(VOCAB)]
        return [weight / sum(weights) for weight in weights]

    return law


def _probability(law: Law, tokens: Path, start: int = 0) -> float:
    return math.prod(law(tokens[:i])[tokens[i]] for i in range(start, len(tokens)))


def _ratio_test(
    target: list[list[float]], draft: list[list[float]], drafts: Path
) -> Iterator[tuple[int, float, float]]:
    """(accepted, probability, weight of the target's law in the residual) of every outcome."""
    so_far = 1.0
    for i, token in enumerate(drafts):
        accept = min(1.0, target[i][token] / draft[i][token])
        yield i, so_far * (1 - accept), 1.0
        so_far *= accept
    yield len(drafts), so_far, 1.0


def _block(target: list[list[float]], draft: list[list[float]], drafts: Path) -> Iterator[tuple[int, float, float]]:
    """The same for block verification: the last of independent coins that shows heads decides."""
    weights = [1.0]
    for i, token in enumerate(drafts):
        weights.append(min(1.0, weights[-1] * target[i][token] / draft[i][token]))
    none_later = 1.0
    for i in range(len(drafts), -1, -1):
        w = weights[i]
        if i == len(drafts):
            heads = w
        else:
            surplus = sum(max(w * p - q, 0.0) for p, q in zip(target[i], draft[i], strict=True))
            heads = 1.0 if i == 0 or w == 1.0 else surplus / (surplus + 1 - w)
        yield i, none_later * heads, w
        none_later *= 1 - heads


def _emitted(rule: object, target: Law, draft: Law, num_drafts: int) -> tuple[dict[Path, float], dict[Path, float]]:
    """Law of the first num_drafts + 1 tokens, and the expected accepted drafts jointly with them, by enumeration."""
    emitted: dict[Path, float] = defaultdict(float)
    accepted: dict[Path, float] = defaultdict(float)
    for drafts in itertools.product(range(VOCAB), repeat=num_drafts):
        rows = [drafts[:i] for i in range(num_drafts)]
        target_rows, draft_rows = [target(row) for row in rows], [draft(row) for row in rows]
        for count, chance, weight in rule(target_rows, draft_rows, drafts):  # type: ignore[operator]
            if chance == 0.0:
                continue
            if count == num_drafts:
                residual = target(drafts)
            else:
                pairs = zip(target_rows[count], draft_rows[count], strict=True)
                surplus = [max(weight * p - q, 0.0) for p, q in pairs]
                residual = [value / sum(surplus) for value in surplus]
            for tail in itertools.product(range(VOCAB), repeat=num_drafts - count):
                for token, share in enumerate(residual):
                    text = (*drafts[:count], token, *tail)
                    mass = _probability(draft, drafts) * chance * share * _probability(target, text, count + 1)
                    emitted[text] += mass
                    accepted[text] += mass * count
    return emitted, accepted


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize("name", ["ratio", "block"])
def test_survival_is_what_the_rule_accepts_and_the_rule_loses_nothing(name: str, num_drafts: int, seed: int) -> None:
    target, draft = _law(seed, 1.5), _law(100 + seed, 1.0)
    emitted, accepted = _emitted({"ratio": _ratio_test, "block": _block}[name], target, draft, num_drafts)
    assert len(emitted) == VOCAB ** (num_drafts + 1)
    for text, mass in emitted.items():
        assert mass == pytest.approx(_probability(target, text), abs=1e-12)
        ratios = torch.tensor([draft(text[:i])[t] / target(text[:i])[t] for i, t in enumerate(text)])
        if name == "ratio":
            survival = chain_survival(ratios.clamp(max=1), num_drafts)
        else:
            survival = block_survival(ratios, num_drafts)
        assert accepted[text] / mass == pytest.approx(survival[0, 1:].sum().item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_one_draft_is_accepted_with_one_minus_tv_by_both(seed: int) -> None:
    target, draft = _law(seed, 1.5)(()), _law(100 + seed, 1.0)(())
    overlap = sum(map(min, target, draft))
    ratios = torch.tensor(draft, dtype=torch.float64) / torch.tensor(target, dtype=torch.float64)
    for survival in (chain_survival(ratios.clamp(max=1), 1), block_survival(ratios, 1)):
        assert (survival[:, 1] * torch.tensor(target)).sum().item() == pytest.approx(overlap, abs=1e-6)


def test_block_verification_accepts_at_least_what_the_ratio_test_does() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(200, generator=generator).exp()
    ratio, block = chain_survival(ratios.clamp(max=1), 6), block_survival(ratios, 6)
    assert (block >= ratio - 1e-12).all()
    assert (block > ratio + 1e-3).any()
    assert (block[:, 1:] <= block[:, :-1]).all()


@pytest.mark.parametrize("seed", range(4))
def test_coupled_samples_agree_at_least_as_often_as_the_bound(seed: int) -> None:
    """And exactly as often as the Gumbel race has it: sum over v of 1 / sum_w max(p_w / p_v, q_w / q_v)."""
    target, draft = _law(seed, 1.5)(()), _law(100 + seed, 1.0)(())
    pairs = list(zip(target, draft, strict=True))
    exact = sum(1 / sum(max(p_w / p, q_w / q) for p_w, q_w in pairs) for p, q in pairs)
    count = 40_000
    gumbel = noise(torch.arange(count)[:, None], torch.tensor([[7]]), torch.arange(VOCAB))
    agree = (torch.tensor(target).log() + gumbel).argmax(1) == (torch.tensor(draft).log() + gumbel).argmax(1)
    overlap = sum(map(min, target, draft))
    assert agree.float().mean().item() == pytest.approx(exact, abs=4 * math.sqrt(0.25 / count))
    assert overlap / (2 - overlap) <= exact <= overlap


def test_matching_accepts_the_prefix_that_the_engine_accepts() -> None:
    generator = random.Random(0)
    text = [generator.randrange(2) for _ in range(30)]
    drafts = [generator.randrange(2) for _ in range(30)]
    survival = chain_survival(torch.tensor([a == b for a, b in zip(text, drafts, strict=True)]), 4)
    for t in range(26):
        assert survival[t, 1:].sum().item() == accepted_prefix(drafts[t : t + 4], text[t : t + 5])


@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_steps_along_a_text_are_those_a_walk_takes(draft_length: int) -> None:
    generator = random.Random(draft_length)
    for _ in range(20):
        matches = [generator.random() < 0.7 for _ in range(generator.randint(1, 25))]
        at, steps, drafted, accepted = 0, 0, 0, 0
        while at < len(matches):
            ahead = matches[at : at + draft_length]
            run = next((i for i, match in enumerate(ahead) if not match), len(ahead))
            steps, drafted, accepted, at = steps + 1, drafted + len(ahead), accepted + run, at + run + 1
        counts = count_steps(chain_survival(torch.tensor(matches), draft_length))
        assert (counts.tokens, counts.steps) == (len(matches), steps)
        assert (counts.drafted, counts.accepted) == (drafted, accepted)


def test_expected_steps_are_the_mean_over_coin_flips() -> None:
    generator = torch.Generator().manual_seed(0)
    accept = torch.rand(12, generator=generator)
    flips = torch.rand(4000, 12, generator=generator) < accept
    walked = [count_steps(chain_survival(flip, 4)) for flip in flips[:1500]]
    expected = count_steps(chain_survival(accept, 4))
    for field in ("steps", "drafted", "accepted"):
        values = torch.tensor([getattr(counts, field) for counts in walked], dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(getattr(expected, field), abs=4 * error)


def test_certain_and_hopeless_drafts() -> None:
    ones = torch.ones(27)
    assert count_steps(block_survival(ones, 8)).steps == 3
    assert count_steps(block_survival(0 * ones, 8)).steps == 27
    assert count_steps(chain_survival(ones, 8)).accepted == 24


def test_a_ratio_of_sums_and_its_error() -> None:
    estimate = ratio_of_sums([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (estimate.value, estimate.standard_error) == (2.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(400):
        bottom = 5 + torch.rand(50, generator=generator)
        top = bottom * (1 + torch.randn(50, generator=generator))
        estimates.append(ratio_of_sums(top.tolist(), bottom.tolist()))
    values = torch.tensor([each.value for each in estimates])
    typical = sum(each.standard_error for each in estimates) / len(estimates)
    assert values.std().item() == pytest.approx(typical, rel=0.15)
    assert math.isnan(ratio_of_sums([1.0], [2.0]).standard_error)
