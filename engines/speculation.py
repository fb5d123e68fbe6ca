"""The step's side of speculation: speaks to the drafters for the sequences, and keeps the books on what they do."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TypeVar

from drafting.cost import StepCost
from drafting.draft_length import FixedLength
from drafting.prices import Load, Prices
from drafting.protocol import SOURCES, Draft, DraftRequest, Source, Verdict
from drafting.speculator import Chosen, Speculator
from engines.draft_reader import DraftReader
from engines.kv_cache import KVCacheManager
from engines.scheduler import Scheduled
from engines.sequence import Sequence
from engines.types import DrafterStats, SpeculationParams, TokenPrompt

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpeculativeDecoding:
    """What loading yields of it: the drafters, the draft model's memory if there is one, the bound of a draft.

    `shares_unsalted`: requests without a `cache_salt` are one tenant, rather than none.
    """

    speculator: Speculator
    reader: DraftReader | None
    max_draft_tokens: int
    shares_unsalted: bool = False

    @classmethod
    def off(cls) -> SpeculativeDecoding:
        """Plain decoding."""
        return cls(Speculator(FixedLength(0), {}, None, {}, Prices(StepCost(), StepCost())), None, 0)


@dataclass(slots=True)
class _Tally:
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.accepted_at.extend([0] * (num_drafted - len(self.accepted_at)))
        for position in range(num_accepted):
            self.accepted_at[position] += 1

    def stats(self) -> DrafterStats:
        return DrafterStats(self.num_drafts, self.num_drafted, self.num_accepted, tuple(self.accepted_at))


class Speculation:
    """One engine's speculation. Owned by the loop thread; called in the order allowances, draft, settle."""

    def __init__(self, decoding: SpeculativeDecoding, kv: KVCacheManager, vocab_size: int) -> None:
        self.speculator = decoding.speculator
        self._reader = decoding.reader
        self._max_draft_tokens = decoding.max_draft_tokens
        self._is_off = decoding.max_draft_tokens == 0
        self.num_failures = 0
        self._unsalted = "" if decoding.shares_unsalted else None
        self._vocabulary = range(vocab_size)
        self._sequences: dict[int, Sequence] = {}  # those that may be drafted for in this step
        self._load = Load(0, 0, 0, 0)
        self._tallies: dict[Source, _Tally] = {}
        self._elapsed_s = 0.0
        if self._reader is not None:
            self._reader.attach(kv, self._sequences)

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in the draft model's memory as in the target's."""
        if self._reader is not None:
            self._reader.copy_blocks(copies)

    def allowances(self, scheduled: SequenceOf[Scheduled]) -> Mapping[int, int]:
        """How many drafts to reserve room for in this step, by seq_id."""
        if self._is_off:
            return {}
        started = time.perf_counter()
        decoding = [item.sequence for item in scheduled if item.sequence.is_decoding]
        self._load = Load(
            num_tokens=sum(item.num_tokens for item in scheduled),
            num_seqs=len(scheduled),
            num_kv_tokens=sum(item.sequence.num_computed_tokens + item.num_tokens for item in scheduled),
            num_decodes=len(decoding),
        )
        requests = [request for sequence in decoding if (request := self._request(sequence)).max_drafts > 0]
        wished = {request.seq_id for request in requests}
        self._sequences.clear()
        self._sequences.update((sequence.seq_id, sequence) for sequence in decoding if sequence.seq_id in wished)
        wanted = self._guarded(lambda: self.speculator.plan(requests, self._load), [0] * len(requests))
        self._elapsed_s = time.perf_counter() - started
        return {request.seq_id: count for request, count in zip(requests, wanted, strict=True)}

    def draft(self, scheduled: Iterable[Scheduled]) -> dict[int, Chosen]:
        """The drafts to verify, by seq_id. Blocks must have been copied as the plan says."""
        started = time.perf_counter()
        granted = {item.sequence.seq_id: item.num_drafts for item in scheduled if item.num_drafts}
        nothing: dict[int, Chosen] = {}
        chosen = self._guarded(lambda: self.speculator.draft(granted), nothing)
        self._elapsed_s += time.perf_counter() - started
        usable = {seq_id: Chosen(one.source, self._usable(one)) for seq_id, one in chosen.items()}
        return {seq_id: one for seq_id, one in usable.items() if one.draft.token_ids}

    def settle(self, verdicts: SequenceOf[Verdict], num_tokens: int, verify_s: float) -> None:
        """Learn from a step whose forward and sampling of `num_tokens` tokens took `verify_s` seconds."""
        for verdict in verdicts:
            if verdict.source is not None:
                tally = self._tallies.setdefault(verdict.source, _Tally())
                tally.add(len(verdict.draft.token_ids), verdict.num_accepted)
        self._guarded(lambda: self.speculator.observe(verdicts, num_tokens, verify_s, self._elapsed_s), None)
        self._sequences.clear()

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended."""
        self._sequences.pop(seq_id, None)
        if self.num_failures:
            # Whatever else has failed, and was logged: what is held of sequences that end must still go.
            with contextlib.suppress(Exception):
                self.speculator.forget(seq_id)
        else:
            self._guarded(lambda: self.speculator.forget(seq_id), None)

    def stats(self) -> dict[str, DrafterStats]:
        """Per drafter, those that have drafted."""
        return {source: tally.stats() for source, tally in self._tallies.items()}

    def _guarded(self, call: Callable[[], T], default: T) -> T:
        """The call's result. If it fails, speculation is off from here on: plain decoding needs none of it."""
        if self._is_off:
            return default
        try:
            return call()
        except Exception:  # noqa: BLE001 - the drafters' border: what only speeds up must not stop what it speeds up
            _log.exception("a drafter has failed: this engine decodes without speculation until it is restarted")
            self._is_off = True
            self.num_failures += 1
            return default

    def _request(self, sequence: Sequence) -> DraftRequest:
        request, wish = sequence.request, sequence.request.speculation
        # Verifying adds one token of the target's own.
        room = request.sampling.max_tokens - sequence.num_output_tokens - 1
        prediction = request.prediction
        return DraftRequest(
            seq_id=sequence.seq_id,
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            max_drafts=min(room, self._bound(wish)),
            num_left=room + 1,
            source=_source(wish),
            tenant=self.tenant(sequence),
            prediction=prediction.token_ids if isinstance(prediction, TokenPrompt) else (),
        )

    def tenant(self, sequence: Sequence) -> str | None:
        """Whose output it is; None: nobody else may profit from it."""
        return sequence.request.cache_salt or self._unsalted

    def _bound(self, wish: SpeculationParams) -> int:
        if wish.drafter == "none":
            return 0
        if wish.max_draft_tokens is None:
            return self._max_draft_tokens
        return min(wish.max_draft_tokens, self._max_draft_tokens)

    def _usable(self, chosen: Chosen) -> Draft:
        """The drafts before the first that is no token, which a drafter with a padded vocabulary may guess."""
        known = itertools.takewhile(self._vocabulary.__contains__, chosen.draft.token_ids)
        return chosen.draft.first(len(tuple(known)))


def _source(wish: SpeculationParams) -> Source | None:
    return next((source for source in SOURCES if source == wish.drafter), None)
