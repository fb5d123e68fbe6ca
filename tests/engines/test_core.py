"""The step, end to end, over a model whose output depends on every token of the context."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafting.protocol import Draft, DraftRequest, Verdict
from engines.admission import Limits
from engines.core import CoreSettings, EngineCore
from engines.errors import ContextLengthError, InvalidRequestError, KVCapacityError
from engines.types import Delta, GenerateRequest, SamplingParams, TextPrompt, TokenPrompt
from tests.engines.context_model import ContextRunner, expected_tokens
from tests.engines.speculating import speculating
from tests.engines.tokenizers import word_tokenizer

VOCAB = 40
EOS = 0


def make_core(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 32,
    drafter: ScriptedDrafter | None = None,
) -> EngineCore:
    limits = Limits(
        max_model_len=64, vocab_size=VOCAB, num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs
    )
    settings = CoreSettings(
        model="context",
        limits=limits,
        max_num_batched_tokens=budget,
        enable_prefix_caching=True,
        priority_step_s=30.0,
        eos_token_ids=frozenset({EOS}),
        device=torch.device("cpu"),
    )
    speculation = speculating({"ngram": drafter}, drafter.length) if drafter else None
    return EngineCore(settings, ContextRunner(num_blocks, block_size, VOCAB), word_tokenizer(VOCAB), speculation)


def make_request(prompt: Sequence[int], n: int = 1, salt: str = "", **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**({"max_tokens": 12, "temperature": 0.0, "ignore_eos": True} | sampling))
    return GenerateRequest("r", TokenPrompt(tuple(prompt)), params, n=n, cache_salt=salt)


def run(core: EngineCore, max_steps: int = 2000) -> dict[tuple[int, int], list[Delta]]:
    """All deltas by (request key, choice), stepping until nothing is left to do."""
    deltas: dict[tuple[int, int], list[Delta]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            return deltas
        for key, items in core.step():
            for delta in items:
                deltas.setdefault((key, delta.index), []).append(delta)
    raise AssertionError("the engine does not come to an end")


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def assert_whole(core: EngineCore) -> None:
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("num_blocks", "budget", "max_num_seqs"),
    [(64, 64, 8), (64, 8, 8), (9, 8, 8), (8, 64, 4), (64, 1, 1)],
    ids=["roomy", "chunked", "chunked and preempting", "preempting", "one token a step"],
)
def test_a_request_reads_the_same_alone_and_in_any_company(
    temperature: float, num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    core = make_core(num_blocks=num_blocks, budget=budget, max_num_seqs=max_num_seqs)
    generator = random.Random(num_blocks + budget)
    prompts = [[generator.randrange(VOCAB) for _ in range(generator.randrange(1, 18))] for _ in range(10)]
    prompts += [[*prompts[0], 5], prompts[1]]
    for key, prompt in enumerate(prompts):
        core.add(key, make_request(prompt, temperature=temperature, seed=key), arrival_s=key)
    deltas = run(core)
    for key, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=12, temperature=temperature)
        assert tokens(deltas[key, 0]) == expected_tokens(prompt, params, key, VOCAB)
    assert core.stats().num_preemptions > 0 or num_blocks == 64
    assert_whole(core)


@pytest.mark.parametrize("num_blocks", [64, 9])
def test_choices_share_the_prompt_and_differ_after_it(num_blocks: int) -> None:
    core = make_core(num_blocks=num_blocks)
    prompt = list(range(1, 7))
    core.add(0, make_request(prompt, n=4, temperature=1.0, seed=3), arrival_s=0.0)
    deltas = run(core)
    texts = [tuple(tokens(deltas[0, index])) for index in range(4)]
    assert len(set(texts)) == 4
    assert all(len(text) == 12 for text in texts)
    alone = make_core()
    alone.add(0, make_request(prompt, n=1, temperature=1.0, seed=3), arrival_s=0.0)
    assert tuple(tokens(run(alone)[0, 0])) == texts[0], "the first choice does not depend on n"
    assert_whole(core)


def test_choices_compute_their_prompt_once() -> None:
    core = make_core()
    core.add(0, make_request(list(range(1, 23)), n=4, temperature=1.0, seed=3), arrival_s=0.0)
    core.step()
    assert core.stats().num_blocks_used == 6, "six blocks of prompt, shared"
    core.step()
    assert core.stats().num_blocks_used == 5 + 4, "the partial one was copied for all but one"


def test_a_seedless_request_is_drawn_anew() -> None:
    core = make_core()
    for key in range(2):
        core.add(key, make_request([1, 2, 3], temperature=1.0), arrival_s=0.0)
    deltas = run(core)
    assert tokens(deltas[0, 0]) != tokens(deltas[1, 0])


def test_cached_tokens_are_reported_and_salts_are_kept_apart() -> None:
    core = make_core()
    prompt = list(range(1, 11))
    cached = []
    for key, salt in enumerate(["a", "a", "b"]):
        core.add(key, make_request(prompt, salt=salt), arrival_s=0.0)
        usage = run(core)[key, 0][-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    assert cached == [0, 8, 0]


class TestEnds:
    def test_length(self) -> None:
        core = make_core()
        core.add(0, make_request([1, 2], max_tokens=3), arrival_s=0.0)
        deltas = run(core)[0, 0]
        assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
        assert deltas[-1].usage is not None
        assert (deltas[-1].usage.prompt_tokens, deltas[-1].usage.completion_tokens) == (2, 3)

    def test_a_stop_token_is_counted_but_not_shown(self) -> None:
        greedy = expected_tokens([1, 2], SamplingParams(max_tokens=12, temperature=0.0), 0, VOCAB)
        core = make_core()
        core.add(0, make_request([1, 2], stop_token_ids=(greedy[3],)), arrival_s=0.0)
        deltas = run(core)[0, 0]
        at = greedy.index(greedy[3])
        assert tokens(deltas) == greedy[: at + 1]
        assert "".join(d.text for d in deltas) == "".join(f" w{i}" for i in greedy[:at])
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", greedy[3])

    def test_eos_ends_unless_ignored(self) -> None:
        prompt, seed = next(
            ([1, 2], seed)
            for seed in range(100)
            if EOS in expected_tokens([1, 2], SamplingParams(max_tokens=12), seed, VOCAB)[:-1]
        )
        core = make_core()
        core.add(0, make_request(prompt, seed=seed, temperature=1.0, ignore_eos=False), arrival_s=0.0)
        core.add(1, make_request(prompt, seed=seed, temperature=1.0, ignore_eos=True), arrival_s=0.0)
        deltas = run(core)
        assert tokens(deltas[0, 0])[-1] == EOS
        assert (deltas[0, 0][-1].finish_reason, deltas[0, 0][-1].stop_reason) == ("stop", None)
        assert len(tokens(deltas[1, 0])) == 12

    def test_min_tokens_holds_eos_back(self) -> None:
        core = make_core()
        for seed in range(20):
            core.add(
                seed, make_request([1], seed=seed, temperature=1.0, ignore_eos=False, min_tokens=12), arrival_s=0.0
            )
        assert all(len(tokens(deltas)) == 12 for deltas in run(core).values())

    def test_a_stop_string_across_tokens_is_cut_and_not_billed_beyond(self) -> None:
        greedy = expected_tokens([1, 2], SamplingParams(max_tokens=12, temperature=0.0), 0, VOCAB)
        core = make_core()
        stop = f"w{greedy[2]} w{greedy[3]} "[1:]
        core.add(0, make_request([1, 2], stop=(stop,)), arrival_s=0.0)
        deltas = run(core)[0, 0]
        assert "".join(d.text for d in deltas) == f" w{greedy[0]} w{greedy[1]} w"
        assert deltas[-1].stop_reason == stop
        assert tokens(deltas) == greedy[:5], "the fifth token's space completes the stop string"


def test_logprobs_have_an_entry_for_each_token() -> None:
    core = make_core()
    core.add(0, make_request([1, 2], logprobs=3, temperature=1.0, seed=1), arrival_s=0.0)
    for delta in run(core)[0, 0]:
        assert delta.logprobs is not None
        assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
        assert all(len(entry.top) == 3 for entry in delta.logprobs)


def test_a_probability_of_zero_has_a_finite_logprob() -> None:
    core = make_core()
    runner: Any = core._runner
    forward = runner.forward

    def pruned(batch: Any) -> torch.Tensor:
        logits = forward(batch)
        logits[:, 1:] = float("-inf")
        return logits

    runner.forward = pruned
    core.add(0, make_request([1, 2], logprobs=3, max_tokens=1), arrival_s=0.0)
    (delta,) = run(core)[0, 0]
    assert delta.logprobs is not None
    assert [entry.logprob for entry in delta.logprobs[0].top] == [0.0, -9999.0, -9999.0]


def test_aborting_frees_the_blocks_at_once() -> None:
    core = make_core(max_num_seqs=4)
    core.add(0, make_request(list(range(20)), n=3), arrival_s=0.0)
    core.add(1, make_request(list(range(20))), arrival_s=0.0)
    core.add(2, make_request(list(range(20))), arrival_s=0.0)
    for _ in range(3):
        core.step()
    for key in (0, 1, 2, 2, 99):
        core.abort(key)
    assert_whole(core)
    assert not core.has_work
    assert core.stats().num_aborted == 3


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (make_request([]), InvalidRequestError, "empty"),
        (make_request([VOCAB]), InvalidRequestError, f"token id {VOCAB}"),
        (make_request([1], n=9), InvalidRequestError, "between 1 and 8"),
        (make_request([1] * 60), ContextLengthError, "64 tokens.*72 tokens.*60 in the prompt, 12 in the completion"),
        (make_request([1] * 30, max_tokens=30), KVCapacityError, "15 KV blocks of 4 tokens.*has 14"),
        (make_request([1], logit_bias={VOCAB: 1.0}), InvalidRequestError, "logit_bias"),
        (make_request([1], stop_token_ids=(-1,)), InvalidRequestError, "stop_token_ids"),
        (make_request([1], min_tokens=13), InvalidRequestError, "min_tokens"),
        (make_request([1], stop=("",)), InvalidRequestError, "stop string is empty"),
        (replace(make_request([1]), priority=10**400), InvalidRequestError, "priority must be between -1000 and 1000"),
        (replace(make_request([1]), priority=-1001), InvalidRequestError, "priority"),
        (GenerateRequest("r", TextPrompt("a"), SamplingParams(max_tokens=1)), InvalidRequestError, "token ids"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(
    request_: GenerateRequest, error: type[InvalidRequestError], words: str
) -> None:
    core = make_core(num_blocks=14)
    with pytest.raises(error, match=words):
        core.add(0, request_, arrival_s=0.0)
    assert not core.has_work


class ScriptedDrafter:
    """Drafts from a copy of the model: the next `right` tokens as it would say them, then wrong ones."""

    def __init__(self, length: int, right: int, seed: int = 0, temperature: float = 0.0) -> None:
        self.length, self.right = length, right
        self._seed = seed
        self._params = SamplingParams(max_tokens=max(right, 1), temperature=temperature)
        self.live: set[int] = set()
        self.verdicts: list[Verdict] = []

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.live.update(request.seq_id for request in requests)
        drafts = [self._drafts(request) for request in requests]
        return [Draft(draft, (0.5,) * len(draft)) for draft in drafts]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts.extend(verdict for verdict in verdicts if verdict.source)

    def forget(self, seq_id: int) -> None:
        self.live.discard(seq_id)

    def _drafts(self, request: DraftRequest) -> tuple[int, ...]:
        truth = expected_tokens(list(request.token_ids), self._params, self._seed, VOCAB) if self.right else []
        following = expected_tokens([*request.token_ids, *truth], self._params, self._seed, VOCAB)[0]
        wrong = [(following + 1) % VOCAB] * self.length
        return tuple([*truth, *wrong][: min(self.length, request.max_drafts)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("length", "right"), [(1, 1), (4, 4), (4, 0), (8, 3), (3, 1)])
@pytest.mark.parametrize("num_blocks", [64, 9])
def test_drafts_right_or_wrong_never_change_the_output(
    temperature: float, length: int, right: int, num_blocks: int
) -> None:
    drafter = ScriptedDrafter(length, right, seed=7, temperature=temperature)
    core = make_core(num_blocks=num_blocks, drafter=drafter)
    prompts = [list(range(i, i + 3 + i)) for i in range(1, 6)]
    for key, prompt in enumerate(prompts):
        core.add(key, make_request(prompt, temperature=temperature, seed=7), arrival_s=key)
    deltas = run(core)
    for key, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=12, temperature=temperature)
        assert tokens(deltas[key, 0]) == expected_tokens(prompt, params, 7, VOCAB)
    stats = core.stats()
    assert stats.num_drafted_tokens > 0
    assert all(verdict.num_accepted == min(right, len(verdict.draft.token_ids)) for verdict in drafter.verdicts)
    assert stats.num_accepted_tokens == sum(verdict.num_accepted for verdict in drafter.verdicts)
    assert not drafter.live, "state of ended sequences is dropped"
    assert_whole(core)


class CarelessDrafter(ScriptedDrafter):
    """Drafts more than it was asked for, and ids that are no tokens."""

    def _drafts(self, request: DraftRequest) -> tuple[int, ...]:
        right = expected_tokens(list(request.token_ids), self._params, self._seed, VOCAB)[:1]
        return (*right, VOCAB, -1, *range(20)) if request.seq_id % 2 else (*right, *range(20))


def test_too_many_drafts_and_drafts_that_are_no_tokens_are_harmless() -> None:
    core = make_core(drafter=CarelessDrafter(3, 1))
    for key in range(4):
        core.add(key, make_request([1, 2, key]), arrival_s=0.0)
    deltas = run(core)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    assert all(tokens(deltas[key, 0]) == expected_tokens([1, 2, key], params, 0, VOCAB) for key in range(4))
    assert core.stats().num_accepted_tokens > 0


def test_priority_comes_first_but_waiting_counts() -> None:
    core = make_core(max_num_seqs=1)
    for key, (priority, arrival_s) in enumerate([(0, 0.0), (0, 1.0), (-1, 2.0), (1, -100.0)]):
        core.add(key, replace(make_request([1, key]), priority=priority), arrival_s)
    ended = [key for (key, _), deltas in run(core).items() if deltas[-1].finish_reason]
    assert ended == [3, 2, 0, 1], "one level is worth 30 seconds of waiting"


def test_a_salt_may_be_any_string() -> None:
    core = make_core()
    core.add(0, make_request([1], salt="\ud800"), arrival_s=0.0)
    assert len(tokens(run(core)[0, 0])) == 12


def test_accepted_drafts_save_steps() -> None:
    steps = []
    for drafter in (None, ScriptedDrafter(4, 4)):
        core = make_core(drafter=drafter)
        core.add(0, make_request([1, 2, 3], max_tokens=21), arrival_s=0.0)
        usage = run(core)[0, 0][-1].usage
        steps.append(core.stats().num_steps)
    assert steps == [21, 5]
    assert usage is not None
    assert (usage.accepted_draft_tokens, usage.rejected_draft_tokens) == (16, 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_arrivals_and_aborts_leave_the_pool_whole(data: st.DataObject) -> None:
    core = make_core(num_blocks=data.draw(st.integers(16, 24)), budget=data.draw(st.integers(8, 20)))
    runner: Any = core._runner
    key = 0
    wanted: dict[int, tuple[list[int], int]] = {}
    got: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "abort"]))
        if action == "add":
            prompt = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=20))
            core.add(key, make_request(prompt, temperature=1.0, seed=key, n=data.draw(st.integers(1, 3))), float(key))
            wanted[key] = (prompt, key)
            key += 1
        elif action == "step" and core.has_work:
            _collect(core, got)
        elif action == "abort" and wanted:
            core.abort(gone := data.draw(st.sampled_from(sorted(wanted))))
            del wanted[gone]
    while core.has_work:
        _collect(core, got)
    for request_key, (prompt, seed) in wanted.items():
        expected = expected_tokens(prompt, SamplingParams(max_tokens=12), seed, VOCAB)
        assert got[request_key] == expected
    assert_whole(core)
    assert runner.num_forwards == core.stats().num_steps


def _collect(core: EngineCore, got: dict[int, list[int]]) -> None:
    for key, deltas in core.step():
        for delta in deltas:
            if delta.index == 0:
                got.setdefault(key, []).extend(delta.token_ids)
