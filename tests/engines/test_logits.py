from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines import logits as module
from engines.logits import (
    RowPenalties,
    TokenHistory,
    add_logit_bias,
    apply_penalties,
    ensure_choice,
    floors,
    is_greedy,
    needs_history,
    scale,
    suppress_tokens,
)
from engines.types import SamplingParams

TOKENS = st.lists(st.integers(0, 12), max_size=30)
INF = math.inf


def _params(**fields: object) -> SamplingParams:
    return SamplingParams.model_validate({"max_tokens": 1, **fields})


def _as_dict(history: TokenHistory, draft_prefix: tuple[int, ...] = ()) -> dict[int, float]:
    token_ids, counts = history.counts(draft_prefix)
    assert len(set(token_ids.tolist())) == len(token_ids) == len(counts)
    return dict(zip(token_ids.tolist(), counts.tolist(), strict=True))


@given(prompt=TOKENS, output=TOKENS, drafts=TOKENS)
def test_history_equals_a_recount(prompt: list[int], output: list[int], drafts: list[int]) -> None:
    history = TokenHistory(prompt)
    for token_id in output:
        history.observe(token_id)
    expected = dict.fromkeys(prompt, 0.0) | Counter(output)
    assert _as_dict(history) == expected
    assert _as_dict(history, tuple(drafts)) == dict.fromkeys(prompt, 0.0) | Counter(output + drafts)
    assert _as_dict(history) == expected, "drafts are not committed"


def test_history_grows_far_beyond_its_first_size() -> None:
    history = TokenHistory([3])
    for token_id in [*range(1000), 3]:
        history.observe(token_id)
    assert _as_dict(history) == dict.fromkeys(range(1000), 1.0) | {3: 2.0}


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 1e-6}, True),
        ({"temperature": 1e-4}, False),
        ({"top_k": 1}, True),
        ({"top_k": 2}, False),
        ({"top_p": 0.0}, True),
        ({"top_p": 0.1}, False),
    ],
)
def test_is_greedy(fields: dict[str, float], greedy: bool) -> None:
    assert is_greedy(_params(**fields)) is greedy


def test_needs_history() -> None:
    assert not needs_history(_params(logit_bias={1: 2}))
    assert needs_history(_params(repetition_penalty=1.1))
    assert needs_history(_params(presence_penalty=-1))
    assert needs_history(_params(frequency_penalty=0.1))


def test_bias_and_suppression_touch_their_entries_only() -> None:
    logits = torch.zeros(3, 4)
    add_logit_bias(logits, {0: {1: 2.5, 3: -100.0}, 2: {0: 1.0}})
    suppress_tokens(logits, {2: (3, 1)})
    assert logits.tolist() == [[0, 2.5, 0, -100], [0, 0, 0, 0], [1, -INF, 0, -INF]]


@pytest.mark.parametrize("token_id", [-1, 4, 10**6])
def test_ids_outside_the_vocabulary_have_no_effect(token_id: int) -> None:
    logits = torch.zeros(2, 4)
    add_logit_bias(logits, {1: {token_id: 1.0}})
    suppress_tokens(logits, {0: (token_id,), 1: (token_id,)})
    penalty = RowPenalties(np.array([token_id]), np.ones(1, np.float32), 2.0, 1.0, 1.0)
    apply_penalties(logits, {1: penalty})
    assert not logits.any()


def test_penalties() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -INF, 1.0]]).repeat(3, 1)
    history = TokenHistory([0, 1, 3])
    for token_id in (2, 2, 3):
        history.observe(token_id)
    apply_penalties(logits, {0: RowPenalties(*history.counts(), 2.0, 0.0, 0.0)})
    apply_penalties(logits, {1: RowPenalties(*history.counts(), 1.0, 0.5, 0.25)})
    assert logits[0].tolist() == [1, -4, 1, -INF, 1], "repetition: prompt and output"
    assert logits[1].tolist() == [2, -2, 2 - 0.5 - 2 * 0.25, -INF, 1], "presence and frequency: output only"
    assert logits[2].tolist() == [2, -2, 2, -INF, 1]


def test_penalties_of_a_draft_prefix_are_those_of_committed_tokens() -> None:
    committed, drafted = TokenHistory([0]), TokenHistory([0])
    for token_id in (2, 2, 1):
        committed.observe(token_id)
    drafted.observe(2)
    first = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    second = first.clone()
    apply_penalties(first, {0: RowPenalties(*committed.counts(), 1.3, 0.5, 0.25)})
    apply_penalties(second, {0: RowPenalties(*drafted.counts((2, 1)), 1.3, 0.5, 0.25)})
    assert torch.equal(first, second)


def test_ensure_choice() -> None:
    logits = torch.tensor([[-INF, -INF], [-INF, 1.0], [math.nan, math.nan], [1.0, math.nan], [INF, 0.0]])
    ensure_choice(logits)
    largest = torch.finfo(torch.float32).max
    assert logits.tolist() == [[0, -INF], [-INF, 1], [0, -INF], [1, -INF], [largest, 0]]


def test_scale() -> None:
    logits = torch.tensor([[1.0, 3.0, -INF], [3e38, -3e38, 0.0], [5.0, 5.0, 4.0]])
    scores = scale(logits, torch.tensor([0.5, 1e-5, 100.0]))
    assert scores[0].tolist() == [-4, 0, -INF]
    assert scores[1].tolist() == [0, -INF, -INF]
    assert scores[2].tolist() == pytest.approx([0, 0, -0.01])


def _kept(law: list[float], **fields: object) -> list[int]:
    """Which tokens survive."""
    scores = scale(torch.tensor([law]).log(), torch.ones(1))
    return (scores >= floors(scores, [_params(**fields)])[:, None])[0].nonzero().flatten().tolist()


LAW = [0.1, 0.4, 0.05, 0.25, 0.2]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 1000}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3, 4]),
        ({"top_p": 0.999}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.49}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        # 0.4 / 0.65 = 0.615: the mass is that of what top-k left. Of the whole, 0.62 would keep two.
        ({"top_k": 2, "top_p": 0.61}, [1]),
        ({"top_k": 2, "top_p": 0.62}, [1, 3]),
        ({"top_k": 3, "min_p": 0.6}, [1, 3]),
        # min-p comes last: had it come first, 0.4 / 0.65 would reach 0.6 alone.
        ({"top_p": 0.6, "min_p": 0.6}, [1, 3]),
    ],
)
def test_filters(fields: dict[str, float], kept: list[int]) -> None:
    assert _kept(LAW, **fields) == kept


def test_equals_are_kept_together() -> None:
    law = [0.2, 0.3, 0.2, 0.1, 0.2]
    assert _kept(law, top_k=2) == [0, 1, 2, 4]
    assert _kept(law, top_p=0.4) == [0, 1, 2, 4]


def test_banned_tokens_are_no_problem_for_filters() -> None:
    scores = torch.tensor([[0.0, -INF, -INF, -1.0]] * 4)
    params = [_params(top_k=3), _params(top_p=0.99), _params(min_p=0.1), _params(top_k=3, top_p=0.9999)]
    floor = floors(scores, params)
    assert not floor.isnan().any()
    assert [(row >= max(f, -1e30)).tolist() for row, f in zip(scores, floor.tolist(), strict=True)] == [
        [True, False, False, True]
    ] * 4


@given(seed=st.integers(0, 1000), top_p=st.floats(0.01, 1.0, exclude_max=True), spread=st.floats(0.1, 20))
def test_a_nucleus_is_the_smallest_set_with_its_mass(seed: int, top_p: float, spread: float) -> None:
    scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(seed)) * spread
    scores = scale(scores, torch.ones(3))
    for row, floor in zip(scores, floors(scores, [_params(top_p=top_p)] * 3), strict=True):
        law = row.double().softmax(0)
        # The mass is known to float32 precision.
        assert law[row >= floor].sum() > top_p - 1e-6, "enough"
        assert law[row > floor].sum() < top_p + 1e-6, "and not one token more"


def test_filters_see_only_the_rows_that_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(scores: torch.Tensor, top_p: list[float]) -> torch.Tensor:
        sizes.append(len(scores))
        return torch.zeros(len(scores))

    monkeypatch.setattr(module, "_top_p_floor", spy)
    floors(torch.zeros(4, 3), [_params(), _params(top_p=0.5), _params(top_k=2), _params()])
    assert sizes == [1]
