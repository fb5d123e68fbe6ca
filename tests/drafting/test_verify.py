from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drafting.noise import noise
from drafting.verify import accepted_prefix
from tests.chi_square import chi_square_z

VOCAB = 3
NUM_TOKENS = 3
NUM_SEEDS = 6000
TARGET = torch.tensor(
    [[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.45, 0.1, 0.45]]
)  # the law of the next token, given the last
CLOSE = torch.tensor([[0.5, 0.4, 0.1], [0.15, 0.2, 0.65], [0.4, 0.2, 0.4]])

# Given the last token, the noise [NUM_TOKENS + K, VOCAB] of the positions to come, and how many: drafts.
Drafter = Callable[[int, Tensor], list[int]]


@pytest.mark.parametrize(
    ("drafts", "samples", "accepted"),
    [([], [4], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3, 3], 1), ([1, 2], [0, 2, 3], 0), ([1, 1], [2, 1, 1], 0)],
)
def test_accepted_prefix(drafts: list[int], samples: list[int], accepted: int) -> None:
    assert accepted_prefix(drafts, samples) == accepted


@given(st.lists(st.integers(0, 2)), st.data())
def test_everything_up_to_the_first_difference_is_accepted(samples: list[int], data: st.DataObject) -> None:
    drafts = data.draw(st.lists(st.integers(0, 2), min_size=len(samples), max_size=len(samples)))
    accepted = accepted_prefix(drafts, [*samples, 0])
    assert drafts[:accepted] == samples[:accepted]
    assert accepted == len(drafts) or drafts[accepted] != samples[accepted]


@pytest.mark.parametrize("samples", [[], [1], [1, 2, 3]])
def test_the_number_of_samples_must_fit(samples: list[int]) -> None:
    with pytest.raises(ValueError, match="1 drafts need 2 samples"):
        accepted_prefix([1], samples)


def _draw(law: Tensor, noise_row: Tensor) -> int:
    return int((law.log() + noise_row).argmax())


def _coupled(last: int, noise_rows: Tensor) -> list[int]:
    """A close model that looks up the same noise."""
    drafts: list[int] = []
    for noise_row in noise_rows[:2]:
        last = _draw(CLOSE[last], noise_row)
        drafts.append(last)
    return drafts


def _perfect(last: int, noise_rows: Tensor) -> list[int]:
    drafts: list[int] = []
    for noise_row in noise_rows[:2]:
        last = _draw(TARGET[last], noise_row)
        drafts.append(last)
    return drafts


def _stubborn(last: int, noise_rows: Tensor) -> list[int]:
    return [2, 2]


def _picky(last: int, noise_rows: Tensor) -> list[int]:
    """Keeps a draft only if it likes its value: a trimming that would bias the ratio test."""
    drafts = _coupled(last, noise_rows)
    return drafts[: next((i for i, draft in enumerate(drafts) if draft == 1), len(drafts))]


def _silent(last: int, noise_rows: Tensor) -> list[int]:
    return []


def _generate(drafter: Drafter, noise_rows: Tensor) -> tuple[tuple[int, ...], int]:
    """NUM_TOKENS tokens after token 0, decoded speculatively, and how many drafts were accepted."""
    tokens: list[int] = [0]
    num_accepted = 0
    while len(tokens) <= NUM_TOKENS:
        ahead = noise_rows[len(tokens) - 1 :]
        drafts = drafter(tokens[-1], ahead)
        context: Sequence[int] = [tokens[-1], *drafts]
        samples = [_draw(TARGET[last], ahead[j]) for j, last in enumerate(context)]
        accepted = accepted_prefix(drafts, samples)
        tokens += samples[: accepted + 1]
        num_accepted += accepted
    return tuple(tokens[1 : NUM_TOKENS + 1]), num_accepted


def _runs(drafter: Drafter) -> list[tuple[tuple[int, ...], int]]:
    positions = torch.arange(1, NUM_TOKENS + 4)
    table = noise(torch.arange(NUM_SEEDS)[:, None, None], positions[None, :, None], torch.arange(VOCAB))
    return [_generate(drafter, noise_rows) for noise_rows in table]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    return [tokens for tokens, _ in _runs(_silent)]


@pytest.mark.parametrize("drafter", [_coupled, _perfect, _stubborn, _picky])
def test_emitted_tokens_follow_the_target_whatever_the_drafter(drafter: Drafter, plain: list[tuple[int, ...]]) -> None:
    runs = _runs(drafter)
    texts = [tokens for tokens, _ in runs]
    assert texts == plain
    counts = Counter(texts)
    outcomes = list(product(range(VOCAB), repeat=NUM_TOKENS))
    law = [float(TARGET[0, a] * TARGET[a, b] * TARGET[b, c]) for a, b, c in outcomes]
    assert chi_square_z([counts[outcome] for outcome in outcomes], law) < 4


def test_coupling_accepts_more_than_independent_draws_could() -> None:
    drafted = 0

    def counting(last: int, noise_rows: Tensor) -> list[int]:
        nonlocal drafted
        drafted += 1
        return _coupled(last, noise_rows)[:1]

    accepted = sum(num for _, num in _runs(counting))
    # The coupling's guarantee (1 - TV) / (1 + TV); independent draws would match below 0.54 in every context.
    worst = float(((TARGET - CLOSE).abs().sum(1) / 2).max())
    assert accepted / drafted > (1 - worst) / (1 + worst)


def test_a_perfect_drafter_is_always_right() -> None:
    def one(last: int, noise_rows: Tensor) -> list[int]:
        return _perfect(last, noise_rows)[:1]

    assert all(num == 2 for _, num in _runs(one))
