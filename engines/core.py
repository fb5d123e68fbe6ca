"""The engine step: schedule, draft, forward, verify, commit, tell. No threads, no asyncio; one caller at a time.

A CPU runs a step while the host waits. Elsewhere the device is given the next step as soon as the tokens of the last
are known, and the host makes their text meanwhile:

    host      launch 1 | wait       | commit 1, launch 2 | tell 1 | wait       | commit 2, launch 3 | tell 2 | ...
    device             | step 1 ... |                    | step 2 ............ |                    | step 3 ...

A sequence whose text turns out to end at a stop string, or that is aborted, may be in flight then: its rows are dropped
on landing. Its blocks are free at once, since the device writes to them before any step that is launched later.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from drafting.protocol import Draft, Verdict
from drafting.speculator import Chosen
from drafting.verify import accepted_prefix
from engines.admission import Limits, check_request
from engines.batch import build_batch
from engines.block_journal import BlockObserver
from engines.block_pool import BlockPool
from engines.counters import Counters
from engines.drawn import Drawn, SampledToken
from engines.kv_cache import KVCacheManager
from engines.model_runner import Runner
from engines.output import Taken, take, tell
from engines.requests import Requests
from engines.sampler import Sampler
from engines.scheduler import Scheduled, Scheduler
from engines.sequence import Sequence, Status
from engines.share import Share
from engines.speculation import Speculation, SpeculativeDecoding
from engines.tokenizer import Tokenizer
from engines.types import Delta, DraftCounts, EngineStats, GenerateRequest


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """The resolved numbers of one engine. `model` is the identity of weights and dtype at the root of block hashes.

    `device` is where the runner's model is; what is not a CPU runs behind the host.
    """

    model: str
    limits: Limits
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    priority_step_s: float
    eos_token_ids: frozenset[int]
    device: torch.device


@dataclass(slots=True)
class _Flight:
    """A step that was launched. `num_rows` of `drawn` are each share's, fixed here: a sequence may end meanwhile."""

    shares: list[Share]
    num_rows: list[int]
    drawn: Drawn
    started_s: float

    @property
    def num_tokens(self) -> int:
        return sum(share.num_tokens for share in self.shares)


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
        self._overlaps = settings.device.type != "cpu"
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
        self._requests = Requests(settings.model, settings.eos_token_ids, tokenizer)
        self._flight: _Flight | None = None
        self._untold: list[tuple[int, Taken]] = []  # of the last step, by request key
        self._count = Counters()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._flight is not None or bool(self._untold)

    @property
    def runner(self) -> Runner:
        """What runs the model. Its KV cache may be overwritten only before the first request."""
        return self._runner

    def add(self, key: int, request: GenerateRequest, arrival_s: float) -> None:
        """Queue a request that arrived at `arrival_s` (monotonic seconds). Raises as check_request does."""
        token_ids = check_request(request, self._settings.limits)
        # One level of priority is worth so many seconds of waiting: an order that starves nobody.
        order = (arrival_s + request.priority * self._settings.priority_step_s, key)
        first = self._requests.open(key, request, token_ids, order)
        self._count.prompt_tokens += len(token_ids)
        self._scheduler.add(first)

    def abort(self, key: int) -> None:
        """Forget a request and free its blocks; unknown or finished requests are ignored."""
        if key in self._requests:
            self._count.aborted += 1
            self._retire(self._requests.drop(key))

    def step(self) -> list[tuple[int, tuple[Delta, ...]]]:
        """Run one step; the news of each request that has any, by its key.

        On a CPU they are those of this very step. Elsewhere it is launched, and they are those of the step before.
        """
        self.wait()
        started = time.perf_counter()
        if self._scheduler.has_work:
            self._flight = self._launch()
            if not self._overlaps:
                self._land()
        news = self._tell()
        self._count.step_time_s += time.perf_counter() - started
        return news

    def wait(self) -> None:
        """Wait for the step in flight, if there is one, and commit its tokens.

        `step` begins with it. Whoever comes or goes between the two still changes what is launched next.
        """
        if self._flight is not None:
            started = time.perf_counter()
            self._land()
            self._count.step_time_s += time.perf_counter() - started

    def watch_blocks(self, observer: BlockObserver) -> None:
        """Tell `observer` what the prefix cache gains and loses."""
        self._pool.watch(observer)

    def stats(self) -> EngineStats:
        return self._count.snapshot(self._scheduler, self._pool, self._speculation)

    def _launch(self) -> _Flight:
        """Schedule, draft, and give the device the forward and the sampling."""
        plan = self._scheduler.schedule()
        self._count.preemptions += plan.num_preempted
        if plan.copies:
            self._runner.copy_blocks(plan.copies)
            self._speculation.copy_blocks(plan.copies)
        chosen = self._speculation.draft(plan.scheduled)
        shares = [Share(item, chosen.get(item.sequence.seq_id), self._forks(item)) for item in plan.scheduled]
        started_s = time.perf_counter()
        items = [share.batch_item() for share in shares]
        logits = self._runner.forward(build_batch(items, self._settings.limits.block_size, self._settings.device))
        rows = [share.sample_rows() for share in shares]
        drawn = self._sampler.draw(logits, list(itertools.chain.from_iterable(rows)))
        return _Flight(shares, [len(own) for own in rows], drawn, started_s)

    def _forks(self, item: Scheduled) -> list[Sequence]:
        """The choices that begin in this step, because it completes the prompt they share."""
        return self._requests.forks(item.sequence) if item.sequence.num_pending_forks and item.reaches_end else []

    def _land(self) -> None:
        """Read the tokens of the step in flight and commit them."""
        flight, self._flight = self._flight, None
        assert flight is not None
        rows = iter(flight.drawn.read())
        verify_s = time.perf_counter() - flight.started_s
        verdicts: list[Verdict] = []
        for share, num_rows in zip(flight.shares, flight.num_rows, strict=True):
            sampled = list(itertools.islice(rows, num_rows))
            if share.item.sequence.status is not Status.FINISHED:
                verdicts += self._commit(share, sampled)
        self._speculation.settle(verdicts, flight.num_tokens, verify_s)
        self._retire(taken.sequence for _, taken in self._untold if taken.finish)
        self._count.steps += 1

    def _commit(self, share: Share, sampled: SequenceOf[SampledToken]) -> list[Verdict]:
        """Verify a share's drafts, keep what stands, start its forks; the verdicts."""
        if not sampled:
            self._scheduler.advance(share.item, [], 0)
            return []
        sequence, drafts = share.item.sequence, share.drafts
        own, of_forks = sampled[: 1 + len(drafts)], sampled[1 + len(drafts) :]
        num_accepted = accepted_prefix(drafts, [token.token_id for token in own])
        if drafts:
            self._judge(share, num_accepted)
        if sequence.num_output_tokens == 0:
            self._count.cached_tokens += sequence.num_cached_tokens
        taken = take(sequence, own[: num_accepted + 1], share.source, num_accepted)
        self._scheduler.advance(share.item, taken.token_ids, num_accepted)
        verdicts = [self._note(taken, share.chosen, num_accepted)]
        for fork, token in zip(share.forks, of_forks, strict=True):
            first = take(fork, [token])
            self._scheduler.fork(sequence, fork)
            fork.token_ids.extend(first.token_ids)
            verdicts.append(self._note(first))
        return verdicts

    def _judge(self, share: Share, num_accepted: int) -> None:
        judged, num_drafted = share.item.sequence.drafts, len(share.drafts)
        judged[share.source] = judged.get(share.source, DraftCounts()) + DraftCounts(num_drafted, num_accepted)
        self._count.drafted += num_drafted
        self._count.accepted += num_accepted

    def _note(self, taken: Taken, chosen: Chosen | None = None, num_accepted: int = 0) -> Verdict:
        """Remember what has to be told, and what it means to the drafters."""
        sequence, token_ids = taken.sequence, taken.token_ids
        if sequence.history is not None:
            for token_id in token_ids:
                sequence.history.observe(token_id)
        self._untold.append((self._requests.key_of(sequence), taken))
        return Verdict(
            seq_id=sequence.seq_id,
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_new=len(token_ids),
            draft=chosen.draft if chosen else Draft(),
            source=chosen.source if chosen else None,
            num_accepted=num_accepted,
            tenant=self._speculation.tenant(sequence),
        )

    def _tell(self) -> list[tuple[int, tuple[Delta, ...]]]:
        """The news of the last step that landed, less those of requests that were aborted since."""
        untold, self._untold = self._untold, []
        news: dict[int, list[Delta]] = {}
        for key, taken in untold:
            if key in self._requests:
                news.setdefault(key, []).append(self._delta(taken))
        for key, deltas in news.items():
            num_finished = sum(delta.finish_reason is not None for delta in deltas)
            self._count.finished += self._requests.note_finished(key, num_finished)
        return [(key, tuple(deltas)) for key, deltas in news.items()]

    def _delta(self, taken: Taken) -> Delta:
        delta = tell(taken, self._tokenizer)
        self._count.generated_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and taken.finish is None:  # by a stop string
            self._retire([taken.sequence])
        return delta

    def _retire(self, sequences: Iterable[Sequence]) -> None:
        """End sequences, in flight or not, and free their blocks; ending one twice is harmless."""
        ended = list(sequences)
        self._scheduler.finish(ended)
        for sequence in ended:
            self._speculation.forget(sequence.seq_id)
