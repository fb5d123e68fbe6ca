"""An engine over the model without weights, with any drafters: what it must emit is known token by token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from drafting.draft_length import LengthPolicy
from drafting.draft_model import Guess, Reading
from drafting.protocol import Draft, Drafter, DraftRequest, Source, Verdict
from engines.admission import Limits
from engines.core import CoreSettings, EngineCore
from engines.draft_reader import DraftReader
from engines.drawn import SampledToken
from engines.logits import TokenHistory, needs_history
from engines.sampler import Sampler, SampleRow
from engines.tokenizer import Tokenizer
from engines.types import Delta, GenerateRequest, SamplingParams, TokenPrompt, joined
from tests.engines.context_model import ContextRunner, QueuedRunner, context_logits
from tests.engines.fake_device import DEVICE, FakeDevice
from tests.engines.speculating import speculating
from tests.engines.tokenizers import word_tokenizer

VOCAB = 16
EOS = 0
ALL_DRAFTERS = frozenset({"ngram", "suffix", "prediction", "model"})
_TOKENIZER = word_tokenizer(VOCAB)
_CPU = torch.device("cpu")


def sample_alone(request: GenerateRequest, *, beyond_end: bool = False) -> list[SampledToken]:
    """The request's output: one token at a time, with no cache, no batch and no drafts.

    `beyond_end` goes on to max_tokens, as if no token ended the output.
    """
    assert isinstance(request.prompt, TokenPrompt)
    prompt, params = list(request.prompt.token_ids), request.sampling
    stop_ids = (frozenset() if params.ignore_eos else {EOS}) | frozenset(params.stop_token_ids)
    suppressed = tuple(sorted(stop_ids)) if params.min_tokens else ()
    history = TokenHistory(prompt) if needs_history(params) else None
    sampler, output, tokens = Sampler(vocab_size=VOCAB), list[SampledToken](), prompt
    while len(output) < params.max_tokens:
        row = SampleRow(params, params.seed or 0, len(tokens), len(output), history, (), suppressed)
        output += sampler.sample(context_logits(tokens, VOCAB)[None], [row])
        tokens.append(output[-1].token_id)
        if history is not None:
            history.observe(tokens[-1])
        if tokens[-1] in stop_ids and not beyond_end:
            break
    return output


def ids(output: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in output]


def request(prompt: Sequence[int], *, n: int = 1, salt: str = "", **sampling: Any) -> GenerateRequest:
    """Greedy, twelve tokens, seed 0, EOS ignored, unless said otherwise."""
    params = SamplingParams(**({"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "seed": 0} | sampling))
    return GenerateRequest("r", TokenPrompt(tuple(prompt)), params, n=n, cache_salt=salt)


class Oracle:
    """Knows the output of each prompt, and says it, or something else wherever `is_right` denies it."""

    def __init__(self, is_right: Callable[[], bool] = lambda: True) -> None:
        self.live: set[int] = set()
        self.asked: list[DraftRequest] = []
        self.verdicts: list[Verdict] = []
        self._outputs: dict[tuple[int, ...], list[int]] = {}
        self._is_right = is_right

    def learn(self, known: GenerateRequest) -> None:
        """Look into the future of a request; of its first choice."""
        assert isinstance(known.prompt, TokenPrompt)
        # Beyond an early end as well: what is drafted there must not come out.
        self._outputs[known.prompt.token_ids] = ids(sample_alone(known, beyond_end=True))

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.asked.extend(requests)
        self.live.update(one.seq_id for one in requests)
        return [self._draft(one) for one in requests]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        assert all(0 <= one.num_accepted <= len(one.draft.token_ids) for one in verdicts)
        # What they point to goes on growing.
        self.verdicts.extend(replace(one, token_ids=tuple(one.token_ids)) for one in verdicts if one.source)

    def forget(self, seq_id: int) -> None:
        self.live.discard(seq_id)

    def _draft(self, asked: DraftRequest) -> Draft:
        output = self._outputs[tuple(asked.token_ids[: asked.num_prompt_tokens])]
        following = output[len(asked.token_ids) - asked.num_prompt_tokens :][: asked.max_drafts]
        drafts = tuple(token if self._is_right() else (token + 1) % VOCAB for token in following)
        return Draft(drafts, (0.5,) * len(drafts))


class WitnessReader(DraftReader):
    """A DraftReader that compares its memory with the sequences' tokens after each forward, over ContextRunner."""

    def __init__(self, runner: ContextRunner, *, max_position: int = 10_000, device: torch.device = _CPU) -> None:
        super().__init__(runner, max_position=max_position, vocab_size=VOCAB, device=device)
        self.memory = runner
        self.readings: list[Reading] = []

    def read(self, readings: Sequence[Reading]) -> list[Guess | None]:
        for reading in readings:
            assert reading.stop <= self.max_position
            assert reading.num_tokens > 0
        guesses = super().read(readings)
        self.readings.extend(readings)
        for reading in readings:
            sequence = self._sequences[reading.seq_id]
            written = self.memory.slots[list(sequence.block_table)].view(-1)[: reading.stop].tolist()
            assert written == [*sequence.token_ids, *reading.drafts][: reading.stop]
        return guesses


class Engine:
    """A core on ContextRunner. `model` is a draft model's perturbation of the target, None for no draft model.

    With a `device`, both models are there, and what it was given in a step is done when the next step begins.
    """

    def __init__(
        self,
        lookups: Mapping[Source, Drafter],
        policy: LengthPolicy | int,
        *,
        model: float | None = None,
        num_blocks: int = 256,
        block_size: int = 4,
        budget: int = 512,
        max_num_seqs: int = 16,
        max_model_len: int = 64,
        max_position: int = 10_000,
        caching: bool = True,
        max_draft_tokens: int = 64,
        padding: int = 0,
        device: FakeDevice | None = None,
        tokenizer: Tokenizer = _TOKENIZER,
    ) -> None:
        limits = Limits(max_model_len, VOCAB, num_blocks, block_size, max_num_seqs, ALL_DRAFTERS)
        where = _CPU if device is None else DEVICE
        settings = CoreSettings("context", limits, budget, caching, 30.0, frozenset({EOS}), where)
        sizes = (num_blocks, block_size, VOCAB)
        self.device = device
        self.runner = ContextRunner(*sizes) if device is None else QueuedRunner(device, *sizes, keeps_busy=True)
        self.reader: WitnessReader | None = None
        if model is not None:
            options: dict[str, Any] = {"perturbation": model, "padding": padding, "may_repeat": True}
            memory = (
                ContextRunner(*sizes, **options)
                if device is None
                else QueuedRunner(device, *sizes, keeps_busy=False, **options)
            )
            self.reader = WitnessReader(memory, max_position=max_position, device=where)
        self.lookups = dict(lookups)
        self.decoding = speculating(self.lookups, policy, self.reader, max_draft_tokens)
        self.core = EngineCore(settings, self.runner, tokenizer, self.decoding)
        self.deltas: dict[tuple[int, int], list[Delta]] = {}
        self._num_added = 0

    @property
    def inner(self) -> Any:
        """The core, for a look at its private parts."""
        return self.core

    def add(self, new: GenerateRequest) -> int:
        key, self._num_added = self._num_added, self._num_added + 1
        for drafter in self.lookups.values():
            if isinstance(drafter, Oracle):
                drafter.learn(new)
        self.core.add(key, new, arrival_s=key)
        return key

    def step(self) -> None:
        with self._device_done():
            news = self.core.step()
        for key, deltas in news:
            for delta in deltas:
                self.deltas.setdefault((key, delta.index), []).append(delta)
        self.check_books()

    def wait(self) -> None:
        """Let the step in flight land, before the next one is launched."""
        with self._device_done():
            self.core.wait()

    def _device_done(self) -> AbstractContextManager[object]:
        if self.device is None:
            return nullcontext()
        self.device.busy = False
        return self.device

    def run(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, key: int, index: int = 0) -> list[int]:
        return [token for delta in self.deltas.get((key, index), []) for token in delta.token_ids]

    def answer(self, key: int, index: int = 0) -> Delta:
        """All deltas of a choice as one."""
        return joined(self.deltas[key, index])[0]

    def check_books(self) -> None:
        """Every block has as many references as holders, and holds the computed, verified tokens."""
        pool, running = self.inner._pool, self.inner._scheduler.running
        held = Counter(block for sequence in running for block in sequence.block_table)
        assert all(pool.references(block) == held[block] for block in range(pool.num_blocks))
        for sequence in running:
            written = self.runner.slots[list(sequence.block_table)].view(-1)[: sequence.num_computed_tokens].tolist()
            assert written == sequence.token_ids[: sequence.num_computed_tokens]
            self._check_read(sequence)

    def _check_read(self, sequence: Any) -> None:
        if self.reader is None:
            return
        kv, memory = self.inner._scheduler._kv, self.reader.memory
        num_read = kv.drafted(sequence)
        read = memory.slots[list(sequence.block_table)].view(-1)[:num_read].tolist()
        assert read == sequence.token_ids[:num_read], "counted as read by the draft model, but it read something else"

    def assert_idle(self) -> None:
        """Nothing runs, nothing is held, nothing is remembered of any sequence."""
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        assert self.decoding.speculator.num_tracked == 0
        assert state_size(self.decoding.speculator) == 0
        assert not self.inner._requests
        assert not self.inner._requests._key_of
        assert not self.inner._speculation._sequences


def state_size(speculator: Any) -> int:
    """Entries in all tables that are kept by sequence."""
    tables = [acceptance._offsets for acceptance in speculator._acceptance.values()]
    names = ("live", "_texts", "_cursors", "_running")
    tables += [
        getattr(drafter, name) for drafter in speculator.lookups.values() for name in names if hasattr(drafter, name)
    ]
    return sum(map(len, tables))


def random_request(generator: random.Random, max_prompt: int = 20, max_tokens: int = 16) -> GenerateRequest:
    """Greedy or sampled, with any other parameters."""
    fields: dict[str, Any] = {
        "max_tokens": (room := generator.randint(1, max_tokens)),
        "temperature": generator.choice([0.0, 0.0, 0.7, 1.0]),
        "seed": generator.randrange(2**31),
        "ignore_eos": generator.random() < 0.7,
    }
    if generator.random() < 0.2:
        fields["min_tokens"] = generator.randint(0, room)
    if generator.random() < 0.2:
        fields |= {"presence_penalty": 0.7, "frequency_penalty": -0.5, "repetition_penalty": 1.3}
    if generator.random() < 0.2:
        fields |= {"top_k": generator.randint(0, VOCAB), "top_p": generator.choice([0.5, 0.9]), "min_p": 0.05}
    if generator.random() < 0.1:
        fields |= {"logit_bias": {EOS: 4.0, 3: -5.0}, "stop_token_ids": (generator.randrange(VOCAB),)}
    return request([generator.randrange(VOCAB) for _ in range(generator.randint(1, max_prompt))], **fields)
