"""Who runs in the next step, and with how many tokens.

One rule (vLLM v1): a sequence's computed tokens chase its known tokens plus its drafts, so prefill, chunked prefill
(arXiv 2403.02310), prefix hit, decode and verification are one case with different counts. Within one token budget:
decodes first, then prefills under way, then admissions; what budget and blocks are left buys drafts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engines.kv_cache import KVCacheManager
from engines.sequence import Sequence, Status


@dataclass(slots=True)
class Scheduled:
    """One sequence's share of a step: `num_tokens` known tokens and up to `num_drafts` drafts after them."""

    sequence: Sequence
    num_tokens: int
    num_drafts: int = 0

    @property
    def reaches_end(self) -> bool:
        """Whether this step computes the newest known token, so that the next one can be sampled."""
        return self.sequence.num_computed_tokens + self.num_tokens == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next forward computes. `copies` (source, destination) are due before it."""

    scheduled: tuple[Scheduled, ...]
    copies: tuple[tuple[int, int], ...]
    num_preempted: int

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens + item.num_drafts for item in self.scheduled)


DraftsWanted = Callable[[list[Scheduled]], Mapping[int, int]]


class Scheduler:
    """Owns the queues and every sequence's status. Used by the loop thread alone.

    `drafts_wanted` is asked once in each step, with all that is scheduled, how many drafts to add for whom, by seq_id;
    for sequences that are not decoding there are none.
    """

    def __init__(
        self, kv: KVCacheManager, *, max_num_seqs: int, max_num_batched_tokens: int, drafts_wanted: DraftsWanted
    ) -> None:
        # Every decode gets its token and at least one token of budget is left for each prefill under way.
        assert max_num_batched_tokens >= max_num_seqs
        self._kv = kv
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._drafts_wanted = drafts_wanted
        self._running: list[Sequence] = []
        self._waiting: list[tuple[tuple[float, int], int, Sequence]] = []  # a heap; seq_id breaks ties

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its `order`."""
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.order, sequence.seq_id, sequence))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start a choice that shares the parent's computed prompt, in a slot reserved when the parent was admitted."""
        assert parent.num_pending_forks > 0
        parent.num_pending_forks -= 1
        self._kv.fork(parent, child)
        child.status = Status.RUNNING
        self._running.append(child)

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out, running or waiting, and free their blocks. Finishing twice is harmless."""
        gone = {id(sequence) for sequence in sequences if sequence.status is not Status.FINISHED}
        if not gone:
            return
        for sequence in self._running:
            if id(sequence) in gone:
                self._kv.free(sequence)
                sequence.status = Status.FINISHED
        self._running = [sequence for sequence in self._running if id(sequence) not in gone]
        kept = [entry for entry in self._waiting if id(entry[2]) not in gone]
        if len(kept) < len(self._waiting):
            for entry in self._waiting:
                if id(entry[2]) in gone:
                    entry[2].status = Status.FINISHED
            heapq.heapify(kept)
            self._waiting = kept

    def schedule(self) -> StepPlan:
        """Plan the next step. Changes block tables and statuses, but not what is computed; `advance` does that."""
        plan = _Plan(self._budget)
        self._running.sort(key=_by_order)
        for decoding in (True, False):
            for sequence in [s for s in self._running if s.is_decoding is decoding]:
                self._continue(sequence, plan)
        if plan.num_preempted == 0:
            self._admit(plan)
        self._grant_drafts(plan)
        scheduled = sorted(plan.scheduled.values(), key=lambda item: item.sequence.order)
        return StepPlan(tuple(scheduled), tuple(self._kv.take_copies()), plan.num_preempted)

    def advance(self, item: Scheduled, new_token_ids: list[int], num_accepted_drafts: int) -> None:
        """Commit a computed share: its known tokens, its accepted drafts and the tokens it yielded.

        `new_token_ids` are the accepted drafts and the target's own token after them. Rejected drafts are not
        computed tokens: their slots are overwritten later.
        """
        sequence = item.sequence
        sequence.num_computed_tokens += item.num_tokens
        sequence.token_ids.extend(new_token_ids)
        # A stop may have cut the accepted run; only tokens that are still known count as computed.
        sequence.num_computed_tokens = min(sequence.num_computed_tokens + num_accepted_drafts, sequence.num_tokens)
        self._kv.publish(sequence)

    def _continue(self, sequence: Sequence, plan: _Plan) -> None:
        """Schedule a running sequence, preempting younger ones for its blocks, or it itself if it is the youngest."""
        if sequence.status is not Status.RUNNING or plan.budget == 0:
            return
        num_tokens = min(sequence.num_uncomputed_tokens, plan.budget)
        while not self._kv.extend(sequence, num_tokens):
            if not plan.has_reclaimed:
                plan.has_reclaimed = True
                self._kv.give_back_spare(self._running)
                continue
            victim = max(self._running, key=_by_order)
            self._preempt(victim, plan)
            if victim is sequence:
                return
        plan.add(sequence, num_tokens)

    def _preempt(self, victim: Sequence, plan: _Plan) -> None:
        """Free a running sequence's blocks and queue it again at its old place."""
        self._running.remove(victim)
        self._kv.free(victim)
        victim.num_preemptions += 1
        plan.remove(victim)
        self.add(victim)

    def _admit(self, plan: _Plan) -> None:
        """Admit from the head of the queue while budget, slots and blocks last; the head is never overtaken."""
        slots = self._max_num_seqs - sum(1 + sequence.num_pending_forks for sequence in self._running)
        promised = sum(self._kv.missing_blocks(sequence) for sequence in self._running)
        while self._waiting and plan.budget > 0:
            sequence = self._waiting[0][2]
            num_slots = 1 + sequence.num_pending_forks
            if num_slots > slots:
                return
            prefix = self._kv.cached_prefix(sequence)
            if not self._kv.can_hold(sequence, prefix, promised):
                if plan.has_reclaimed:
                    return
                plan.has_reclaimed = True
                self._kv.give_back_spare(self._running)
                continue
            slots -= num_slots
            heapq.heappop(self._waiting)
            self._kv.admit(sequence, prefix)
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.status = Status.RUNNING
            self._running.append(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, plan.budget)
            extended = self._kv.extend(sequence, num_tokens)
            assert extended, "can_hold has counted the blocks"
            promised += self._kv.missing_blocks(sequence)
            plan.add(sequence, num_tokens)

    def _grant_drafts(self, plan: _Plan) -> None:
        """Spend what is left of the budget on drafts; no sequence is preempted for them."""
        items = list(plan.scheduled.values())
        all_wanted = self._drafts_wanted(items)
        for item in items:
            wanted = min(all_wanted.get(item.sequence.seq_id, 0), plan.budget)
            if wanted > 0 and self._kv.extend(item.sequence, item.num_tokens + wanted):
                item.num_drafts = wanted
                plan.budget -= wanted


class _Plan:
    """A step under construction."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_preempted = 0
        self.has_reclaimed = False
        self.scheduled: dict[int, Scheduled] = {}

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.scheduled[sequence.seq_id] = Scheduled(sequence, num_tokens)
        self.budget -= num_tokens

    def remove(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        item = self.scheduled.pop(sequence.seq_id, None)
        if item is not None:
            self.budget += item.num_tokens


def _by_order(sequence: Sequence) -> tuple[tuple[float, int], int]:
    return sequence.order, sequence.seq_id
