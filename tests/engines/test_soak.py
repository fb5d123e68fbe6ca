"""Random traffic on tiny pools: every choice reads as it would alone, and the books balance after each step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from drafting.noise import choice_seed, request_seed
from drafting.protocol import Draft, DraftRequest, Verdict
from engines.admission import Limits
from engines.core import CoreSettings, EngineCore
from engines.logits import TokenHistory, needs_history
from engines.sampler import Sampler, SampleRow
from engines.types import Delta, FinishReason, GenerateRequest, SamplingParams, TokenPrompt
from tests.engines.context_model import ContextRunner, QueuedRunner, context_logits
from tests.engines.fake_device import DEVICE, FakeDevice
from tests.engines.speculating import speculating
from tests.engines.tokenizers import word_tokenizer

VOCAB = 12
EOS = 0
MAX_STEPS = 20_000


def alone(prompt: list[int], params: SamplingParams, seed: int) -> tuple[list[int], FinishReason]:
    """One token at a time, with no cache, no batch and no drafts."""
    stop_ids = (frozenset() if params.ignore_eos else {EOS}) | frozenset(params.stop_token_ids)
    suppressed = tuple(sorted(stop_ids)) if params.min_tokens else ()
    history = TokenHistory(prompt) if needs_history(params) else None
    sampler, output = Sampler(vocab_size=VOCAB), list[int]()
    while len(output) < params.max_tokens:
        position = len(prompt) + len(output)
        row = SampleRow(params, seed, position, len(output), history, (), suppressed)
        output.append(sampler.sample(context_logits([*prompt, *output], VOCAB)[None], [row])[0].token_id)
        if history is not None:
            history.observe(output[-1])
        if output[-1] in stop_ids:
            return output, "stop"
    return output, "length"


class RandomDrafter:
    """Any number of drafts, most of them what greedy decoding would say."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        self.live: set[int] = set()

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.live.update(request.seq_id for request in requests)
        return [self._drafts(request) for request in requests]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        assert all(0 <= verdict.num_accepted <= len(verdict.draft.token_ids) for verdict in verdicts)

    def forget(self, seq_id: int) -> None:
        self.live.discard(seq_id)

    def _drafts(self, request: DraftRequest) -> Draft:
        context = list(request.token_ids)
        for _ in range(self._random.randint(0, min(6, request.max_drafts))):
            is_right = self._random.random() < 0.7
            context.append(int(context_logits(context, VOCAB).argmax()) if is_right else self._random.randrange(VOCAB))
        drafts = tuple(context[len(request.token_ids) :])
        return Draft(drafts, tuple(self._random.random() for _ in drafts))


class Traffic:
    """Random requests for one random engine, and what came of them; on a device that runs behind its host, if given."""

    def __init__(self, seed: int, device: FakeDevice | None = None) -> None:
        self.random = random.Random(seed)
        pick = self.random
        self.max_model_len = pick.randint(6, 30)
        block_size = pick.choice([1, 2, 3, 4, 8, 33])
        num_blocks = -(-self.max_model_len // block_size) + pick.choice([0, 0, 1, 2, 5, 20])
        self.max_num_seqs = pick.randint(1, 6)
        self.drafter = RandomDrafter(pick) if pick.random() < 0.6 else None
        settings = CoreSettings(
            model="context",
            limits=Limits(self.max_model_len, VOCAB, num_blocks, block_size, self.max_num_seqs),
            max_num_batched_tokens=self.max_num_seqs + pick.choice([0, 0, 1, 3, 20]),
            enable_prefix_caching=pick.random() < 0.8,
            priority_step_s=3.0,
            eos_token_ids=frozenset({EOS}),
            device=torch.device("cpu") if device is None else DEVICE,
        )
        sizes = (num_blocks, block_size, VOCAB)
        self.device = device
        self.runner = ContextRunner(*sizes) if device is None else QueuedRunner(device, *sizes, keeps_busy=True)
        speculation = speculating({"ngram": self.drafter}, 6) if self.drafter else None
        self.core = EngineCore(settings, self.runner, word_tokenizer(VOCAB), speculation)
        self.wanted: dict[int, GenerateRequest] = {}
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.last: dict[tuple[int, int], Delta] = {}

    def add(self, key: int) -> None:
        pick = self.random
        prompt = tuple(pick.randrange(3) for _ in range(pick.randint(1, self.max_model_len - 1)))
        room = self.max_model_len - len(prompt)
        request = GenerateRequest(
            request_id=str(key),
            prompt=TokenPrompt(prompt),
            sampling=self._sampling(room if pick.random() < 0.4 else pick.randint(1, room)),
            n=pick.randint(1, min(4, self.max_num_seqs)),
            priority=pick.randint(-1, 1),
            cache_salt=pick.choice(["", "", "x"]),
        )
        self.core.add(key, request, float(key))
        self.wanted[key] = request

    def step(self) -> None:
        if self.device is None:
            news = self.core.step()
        else:
            self.device.busy = False
            with self.device:
                news = self.core.step()
        for key, deltas in news:
            for delta in deltas:
                assert (key, delta.index) not in self.last, "news after the last delta"
                self.tokens.setdefault((key, delta.index), []).extend(delta.token_ids)
                if delta.finish_reason is not None:
                    self.last[key, delta.index] = delta

    def _sampling(self, max_tokens: int) -> SamplingParams:
        pick = self.random
        fields: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": pick.choice([0, 0, 0.7, 1.0]),
            "seed": pick.randint(-5, 5),
            "ignore_eos": pick.random() < 0.6,
        }
        if pick.random() < 0.3:
            fields["min_tokens"] = pick.randint(0, max_tokens)
        if pick.random() < 0.3:
            fields |= {"presence_penalty": pick.uniform(-2, 2), "frequency_penalty": pick.uniform(-2, 2)}
            fields["repetition_penalty"] = pick.choice([1.0, 1.3, 0.8])
        if pick.random() < 0.2:
            fields |= {"top_k": pick.randint(0, VOCAB), "top_p": pick.choice([0.5, 0.9]), "min_p": 0.05}
        if pick.random() < 0.2:
            fields["logit_bias"] = {EOS: 100.0}
        if pick.random() < 0.2:
            fields["stop_token_ids"] = (pick.randrange(VOCAB),)
        return SamplingParams(**fields)

    def check_books(self) -> None:
        core: Any = self.core
        pool, running = core._pool, core._scheduler.running
        assert sum(1 + sequence.num_pending_forks for sequence in running) <= self.max_num_seqs
        held = Counter(block for sequence in running for block in sequence.block_table)
        for block in range(pool.num_blocks):
            assert pool.references(block) == held[block]
            assert pool.is_free(block) == (held[block] == 0)
        for sequence in running:
            written = self.runner.slots[list(sequence.block_table)].view(-1)[: sequence.num_computed_tokens].tolist()
            assert written == sequence.token_ids[: sequence.num_computed_tokens]

    def check_outcome(self) -> None:
        for key, request in self.wanted.items():
            assert isinstance(request.prompt, TokenPrompt)
            seed = request_seed(request.sampling.seed or 0)
            for index in range(request.n):
                expected = alone(list(request.prompt.token_ids), request.sampling, choice_seed(seed, index))
                last = self.last[key, index]
                assert (self.tokens[key, index], last.finish_reason) == expected
                assert last.usage is not None
                assert last.usage.completion_tokens == len(expected[0])
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        assert self.drafter is None or not self.drafter.live


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic(seed: int) -> None:
    run_traffic(Traffic(seed))


@pytest.mark.parametrize("seed", range(30))
def test_random_traffic_on_a_device_that_runs_behind_its_host(seed: int) -> None:
    device = FakeDevice()
    traffic = Traffic(seed, device)
    run_traffic(traffic)
    assert device.num_reads == traffic.core.stats().num_steps, "one read a step, and no other waiting"


def run_traffic(traffic: Traffic) -> None:
    num_requests = traffic.random.randint(4, 12)
    added = 0
    for _ in range(MAX_STEPS):
        if added < num_requests and (traffic.random.random() < 0.4 or not traffic.core.has_work):
            traffic.add(added)
            added += 1
        unfinished = [key for key, one in traffic.wanted.items() if (key, one.n - 1) not in traffic.last]
        if unfinished and traffic.random.random() < 0.05:
            traffic.core.abort(unfinished[0])
            del traffic.wanted[unfinished[0]]
        if traffic.core.has_work:
            traffic.step()
        traffic.check_books()
        if added == num_requests and not traffic.core.has_work:
            traffic.check_outcome()
            return
    raise AssertionError("the engine does not come to an end")
