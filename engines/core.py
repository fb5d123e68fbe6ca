"""The engine step: schedule, draft, forward, verify, commit. No threads, no asyncio; one caller at a time."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from drafting.noise import choice_seed, request_seed
from drafting.protocol import Draft, Verdict
from drafting.speculator import Chosen
from drafting.verify import accepted_prefix
from engines.admission import Limits, check_request
from engines.batch import build_batch
from engines.block_hash import root_hash
from engines.block_pool import BlockPool
from engines.kv_cache import KVCacheManager
from engines.logits import TokenHistory, needs_history
from engines.model_runner import Runner
from engines.output import absorb
from engines.sampler import SampledToken, Sampler
from engines.scheduler import Scheduled, Scheduler
from engines.sequence import Sequence
from engines.share import Share
from engines.speculation import Speculation, SpeculativeDecoding
from engines.text_stream import TextStream
from engines.tokenizer import Tokenizer
from engines.types import Delta, EngineStats, GenerateRequest


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """The resolved numbers of one engine. `model` is the identity of weights and dtype at the root of block hashes."""

    model: str
    limits: Limits
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    priority_step_s: float
    eos_token_ids: frozenset[int]
    device: torch.device


@dataclass(slots=True)
class _Request:
    """A request's choices under way. Choices beyond the first join when the first one's prompt is computed."""

    request: GenerateRequest
    sequences: list[Sequence] = field(default_factory=list)
    num_finished: int = 0


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    drafted: int = 0
    accepted: int = 0
    step_time_s: float = 0.0


class EngineCore:
    """Requests in, deltas out, one step at a time. Requests are known by a key of the caller's choosing."""

    def __init__(
        self,
        settings: CoreSettings,
        runner: Runner,
        tokenizer: Tokenizer,
        speculation: SpeculativeDecoding | None = None,
    ) -> None:
        limits = settings.limits
        self._settings = settings
        self._runner = runner
        self._tokenizer = tokenizer
        self._sampler = Sampler(vocab_size=limits.vocab_size)
        self._pool = BlockPool(limits.num_blocks)
        kv = KVCacheManager(self._pool, limits.block_size, enable_prefix_caching=settings.enable_prefix_caching)
        self._speculation = Speculation(speculation or SpeculativeDecoding.off(), kv, limits.vocab_size)
        self._scheduler = Scheduler(
            kv,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            drafts_wanted=self._speculation.allowances,
        )
        self._requests: dict[int, _Request] = {}
        self._key_of: dict[int, int] = {}  # seq_id -> request key
        self._seq_ids = itertools.count()
        self._count = _Counters()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def runner(self) -> Runner:
        """What runs the model. Its KV cache may be overwritten only before the first request."""
        return self._runner

    def add(self, key: int, request: GenerateRequest, arrival_s: float) -> None:
        """Queue a request that arrived at `arrival_s` (monotonic seconds). Raises as check_request does."""
        token_ids = check_request(request, self._settings.limits)
        seed = request.sampling.seed
        seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        state = _Request(request)
        # One level of priority is worth so many seconds of waiting: an order that starves nobody.
        order = (arrival_s + request.priority * self._settings.priority_step_s, key)
        first = self._sequence(key, state, 0, choice_seed(request_seed(seed), 0), order, token_ids)
        first.num_pending_forks = request.n - 1
        self._requests[key] = state
        self._count.prompt_tokens += len(token_ids)
        self._scheduler.add(first)

    def abort(self, key: int) -> None:
        """Forget a request and free its blocks; unknown or finished requests are ignored."""
        state = self._requests.pop(key, None)
        if state is None:
            return
        self._count.aborted += 1
        self._retire(state.sequences)

    def step(self) -> list[tuple[int, tuple[Delta, ...]]]:
        """Run one step; the news of each request that has any, by its key."""
        started = time.perf_counter()
        plan = self._scheduler.schedule()
        if plan.copies:
            self._copy_blocks(plan.copies)
        chosen = self._speculation.draft(plan.scheduled)
        shares = [Share(item, chosen.get(item.sequence.seq_id), self._forks(item)) for item in plan.scheduled]
        verifying = time.perf_counter()
        sampled = self._forward(shares)
        verify_s = time.perf_counter() - verifying
        news, verdicts = self._commit(shares, sampled)
        self._speculation.settle(verdicts, sum(share.num_tokens for share in shares), verify_s)
        answers = [(key, self._close_finished(key, deltas)) for key, deltas in news.items()]
        self._count.steps += 1
        self._count.preemptions += plan.num_preempted
        self._count.step_time_s += time.perf_counter() - started
        return answers

    def stats(self) -> EngineStats:
        count = self._count
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks_total=self._pool.num_blocks,
            num_blocks_used=self._pool.num_used,
            num_blocks_cached=self._pool.num_cached,
            num_steps=count.steps,
            num_prompt_tokens=count.prompt_tokens,
            num_cached_tokens=count.cached_tokens,
            num_generated_tokens=count.generated_tokens,
            num_preemptions=count.preemptions,
            num_finished=count.finished,
            num_aborted=count.aborted,
            num_drafted_tokens=count.drafted,
            num_accepted_tokens=count.accepted,
            step_time_s=count.step_time_s,
            speculation_time_s=self._speculation.speculator.time_s,
            speculation_plain_time_s=self._speculation.speculator.plain_time_s,
            num_speculation_failures=self._speculation.num_failures,
            drafters=self._speculation.stats(),
        )

    def _sequence(
        self, key: int, state: _Request, index: int, seed: int, order: tuple[float, int], token_ids: SequenceOf[int]
    ) -> Sequence:
        sampling = state.request.sampling
        eos = frozenset() if sampling.ignore_eos else self._settings.eos_token_ids
        stop_ids = eos | frozenset(sampling.stop_token_ids)
        sequence = Sequence(
            seq_id=next(self._seq_ids),
            request=state.request,
            index=index,
            seed=seed,
            order=order,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            root=root_hash(self._settings.model, salt=state.request.cache_salt),
            text=TextStream(self._tokenizer, sampling.stop, token_ids),
            history=TokenHistory(token_ids) if needs_history(sampling) else None,
            suppressed=tuple(sorted(stop_ids)) if sampling.min_tokens else (),
            stop_ids=stop_ids,
        )
        state.sequences.append(sequence)
        self._key_of[sequence.seq_id] = key
        return sequence

    def _forks(self, item: Scheduled) -> list[Sequence]:
        """The choices that begin in this step, because it completes the prompt they share."""
        parent = item.sequence
        if not (parent.num_pending_forks and item.reaches_end):
            return []
        key = self._key_of[parent.seq_id]
        prompt = parent.token_ids[: parent.num_prompt_tokens]
        forks = []
        for index in range(1, parent.num_pending_forks + 1):
            seed = choice_seed(parent.seed, index)
            fork = self._sequence(key, self._requests[key], index, seed, parent.order, prompt)
            fork.num_cached_tokens = parent.num_cached_tokens
            forks.append(fork)
        return forks

    def _copy_blocks(self, copies: SequenceOf[tuple[int, int]]) -> None:
        self._runner.copy_blocks(copies)
        self._speculation.copy_blocks(copies)

    def _forward(self, shares: SequenceOf[Share]) -> list[SampledToken]:
        """One forward of the shares' tokens, and a sampled token for each of their rows."""
        items = [share.batch_item() for share in shares]
        logits = self._runner.forward(build_batch(items, self._settings.limits.block_size, self._settings.device))
        rows = [row for share in shares for row in share.sample_rows()]
        return self._sampler.sample(logits, rows) if rows else []

    def _commit(
        self, shares: SequenceOf[Share], sampled: SequenceOf[SampledToken]
    ) -> tuple[dict[int, list[Delta]], list[Verdict]]:
        """Verify each share's drafts, keep what stands, start its forks; the news by request key, and the verdicts."""
        news: dict[int, list[Delta]] = {}
        verdicts: list[Verdict] = []
        rows = iter(sampled)
        for share in shares:
            own = list(itertools.islice(rows, share.num_rows))
            sequence = share.item.sequence
            if not own:
                self._scheduler.advance(share.item, [], 0)
                continue
            num_accepted = accepted_prefix(share.drafts, [token.token_id for token in own])
            self._judge(sequence, share.drafts, num_accepted)
            num_known = sequence.num_tokens
            delta = self._keep(share, own[: num_accepted + 1], num_accepted)
            news.setdefault(self._key_of[sequence.seq_id], []).append(delta)
            verdicts.append(
                _verdict(
                    sequence,
                    sequence.num_tokens - num_known,
                    self._speculation.tenant(sequence),
                    share.chosen,
                    num_accepted,
                )
            )
            for fork in share.forks:
                news[self._key_of[fork.seq_id]].append(self._start_fork(sequence, fork, next(rows)))
                verdicts.append(_verdict(fork, fork.num_output_tokens, self._speculation.tenant(fork)))
        return news, verdicts

    def _judge(self, sequence: Sequence, drafts: tuple[int, ...], num_accepted: int) -> None:
        sequence.num_accepted_drafts += num_accepted
        sequence.num_rejected_drafts += len(drafts) - num_accepted
        self._count.drafted += len(drafts)
        self._count.accepted += num_accepted

    def _keep(self, share: Share, sampled: SequenceOf[SampledToken], num_accepted: int) -> Delta:
        sequence = share.item.sequence
        if sequence.num_output_tokens == 0:
            self._count.cached_tokens += sequence.num_cached_tokens
        kept, delta = absorb(sequence, sampled, self._tokenizer, share.source, num_accepted)
        self._observe(sequence, kept)
        self._scheduler.advance(share.item, kept, num_accepted)
        return delta

    def _start_fork(self, parent: Sequence, fork: Sequence, sampled: SampledToken) -> Delta:
        kept, delta = absorb(fork, [sampled], self._tokenizer)
        self._observe(fork, kept)
        self._scheduler.fork(parent, fork)
        fork.token_ids.extend(kept)
        return delta

    def _observe(self, sequence: Sequence, kept: SequenceOf[int]) -> None:
        self._count.generated_tokens += len(kept)
        if sequence.history is not None:
            for token_id in kept:
                sequence.history.observe(token_id)

    def _close_finished(self, key: int, deltas: list[Delta]) -> tuple[Delta, ...]:
        state = self._requests[key]
        done = {delta.index for delta in deltas if delta.finish_reason is not None}
        if done:
            self._retire([sequence for sequence in state.sequences if sequence.index in done])
            state.num_finished += len(done)
            if state.num_finished == state.request.n:
                del self._requests[key]
                self._count.finished += 1
        return tuple(deltas)

    def _retire(self, sequences: SequenceOf[Sequence]) -> None:
        self._scheduler.finish(sequences)
        for sequence in sequences:
            if self._key_of.pop(sequence.seq_id, None) is not None:
                self._speculation.forget(sequence.seq_id)


def _verdict(
    sequence: Sequence, num_new: int, tenant: str | None, chosen: Chosen | None = None, num_accepted: int = 0
) -> Verdict:
    return Verdict(
        seq_id=sequence.seq_id,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_new=num_new,
        draft=chosen.draft if chosen else Draft(),
        source=chosen.source if chosen else None,
        num_accepted=num_accepted,
        tenant=tenant,
    )
