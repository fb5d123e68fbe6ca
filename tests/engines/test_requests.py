"""Who is whose choice, from arrival to the last end."""

from __future__ import annotations

from typing import Any

import pytest

from engines.requests import Requests
from engines.sequence import Sequence
from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from tests.engines.tokenizers import word_tokenizer

EOS = 0
PROMPT = (3, 4, 5)
TOKENIZER = word_tokenizer(10)


@pytest.fixture
def requests() -> Requests:
    return Requests("model", frozenset({EOS}), TOKENIZER)


def open_(requests: Requests, key: int, n: int = 1, salt: str = "", **sampling: Any) -> Sequence:
    params = SamplingParams(**({"max_tokens": 8} | sampling))
    request = GenerateRequest(str(key), TokenPrompt(PROMPT), params, n=n, cache_salt=salt)
    return requests.open(key, request, PROMPT, (1.5, key))


def test_the_first_choice_waits_for_the_others_prompt(requests: Requests) -> None:
    first = open_(requests, 7, n=3, seed=11)
    assert (first.index, first.seed, first.order, first.num_pending_forks) == (0, 11, (1.5, 7), 2)
    assert (first.token_ids, first.num_prompt_tokens) == ([3, 4, 5], 3)
    assert requests.key_of(first) == 7
    assert 7 in requests


def test_forks_begin_with_the_prompt_and_have_seeds_of_their_own(requests: Requests) -> None:
    first = open_(requests, 7, n=3, seed=11)
    first.num_cached_tokens = 2
    first.token_ids.append(9)
    forks = requests.forks(first)
    assert [(fork.index, fork.token_ids, fork.order, fork.num_cached_tokens) for fork in forks] == [
        (1, [3, 4, 5], (1.5, 7), 2), (2, [3, 4, 5], (1.5, 7), 2),
    ]  # fmt: skip
    assert len({first.seed, *(fork.seed for fork in forks)}) == 3
    assert len({first.seq_id, *(fork.seq_id for fork in forks)}) == 3
    assert [requests.key_of(fork) for fork in forks] == [7, 7]


def test_without_a_seed_one_is_drawn(requests: Requests) -> None:
    assert open_(requests, 1).seed != open_(requests, 2).seed


def test_what_ends_a_sequence(requests: Requests) -> None:
    assert open_(requests, 1, stop_token_ids=(5,)).stop_ids == {EOS, 5}
    held_back = open_(requests, 2, stop_token_ids=(5,), ignore_eos=True, min_tokens=2)
    assert (held_back.stop_ids, held_back.suppressed) == ({5}, (5,))
    assert open_(requests, 3).suppressed == ()


def test_history_is_kept_where_a_penalty_asks_for_it(requests: Requests) -> None:
    assert open_(requests, 1).history is None
    assert open_(requests, 2, presence_penalty=0.5).history is not None


def test_salts_root_the_hashes(requests: Requests) -> None:
    roots = {open_(requests, key, salt=salt).root for key, salt in enumerate(["", "a", "a"])}
    assert len(roots) == 2


def test_a_request_is_over_with_its_last_choice(requests: Requests) -> None:
    first = open_(requests, 7, n=3)
    requests.forks(first)
    assert [requests.note_finished(7, count) for count in (0, 2, 0)] == [False] * 3
    assert len(requests) == 1
    assert requests.note_finished(7, 1)
    assert 7 not in requests
    assert not requests._key_of


def test_a_dropped_request_gives_its_sequences_back_once(requests: Requests) -> None:
    first = open_(requests, 7, n=2)
    other = open_(requests, 8)
    forks = requests.forks(first)
    assert requests.drop(7) == [first, *forks]
    assert requests.drop(7) == []
    assert (len(requests), requests.key_of(other)) == (1, 8)
