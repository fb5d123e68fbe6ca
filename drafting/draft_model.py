"""A small language model as drafter (speculative decoding: arXiv 2211.17192, 2302.01318).

It reads the sequences' verified tokens that it has not read yet, and then guesses one token after another, all
sequences together. Each guess is *sampled* by the target's own rule with the target's own noise (Gumbel coupling, arXiv
2408.07978), which is the reader's part; here is decided who reads what, and when to stop.

    verified tokens    a b c d e          read so far: a b c d
    round 1            read e, guess f    (after full acceptance two tokens are unread, after a rejection one)
    round 2            read f, guess g
    verified           f h                read, and still right: a b c d e f
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.protocol import Draft, DraftRequest, Verdict


@dataclass(frozen=True, slots=True)
class Reading:
    """For one sequence: read its verified tokens `start` to `stop`, then `drafts`; guess what follows, if `guesses`.

    `drafts` follow the last verified token, and may be longer than what is unread of them: `start` counts through.
    """

    seq_id: int
    start: int
    stop: int
    drafts: tuple[int, ...] = ()
    guesses: bool = True

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Guess:
    """A sampled token, and the probability that the model gave it."""

    token_id: int
    belief: float


class Reader(Protocol):
    """The draft model itself, with its memory of each sequence. Owned by the engine, which owns the KV blocks."""

    max_position: int
    """Tokens of a sequence that it can read."""

    def num_read(self, seq_id: int) -> int:
        """How many of the sequence's leading verified tokens are read."""
        ...

    def read(self, readings: Sequence[Reading]) -> list[Guess | None]:
        """Read tokens into memory, all sequences in one forward; a guess for each reading that wants one."""
        ...


@dataclass(slots=True)
class _Run:
    """A draft in the making."""

    request: DraftRequest
    num_read: int
    room: int
    guesses: list[Guess] = field(default_factory=list)
    next_gain: float = 1.0  # how likely the next guess is to stand

    @property
    def num_unread(self) -> int:
        return len(self.request.token_ids) - self.num_read

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(guess.token_id for guess in self.guesses)

    @property
    def is_done(self) -> bool:
        return len(self.guesses) >= self.room


class DraftModel:
    """The Drafter protocol over a Reader. Not more than `max_reading_tokens` are caught up on in one call."""

    def __init__(self, reader: Reader, acceptance: Acceptance, cost: StepCost, max_reading_tokens: int = 512) -> None:
        self._reader = reader
        self._acceptance = acceptance
        self._cost = cost
        self.max_reading_tokens = max_reading_tokens

    def num_unread(self, request: DraftRequest) -> int:
        """Tokens it has to read before the first guess, at least 1."""
        return len(request.token_ids) - self._reader.num_read(request.seq_id)

    def room(self, request: DraftRequest) -> int:
        """How many tokens it can draft for this request."""
        return max(0, min(request.max_drafts, self._reader.max_position - len(request.token_ids)))

    def propose(
        self, requests: Sequence[DraftRequest], token_prices: Sequence[float] = (0.0,), second_price: float = 0.0
    ) -> list[Draft]:
        """See Drafter. Drafts end early where another round does not pay.

        Prices are in emitted tokens: `second_price` of a second of drafting, `token_prices[n]` of verifying one more
        where n tokens of all requests are drafted already, and beyond the last as there. Where some drafts end early,
        the others' tokens are the cheaper for it.
        """
        runs = [_Run(request, self._reader.num_read(request.seq_id), self.room(request)) for request in requests]
        ready = self._begin([run for run in runs if run.room])
        while ready:
            self._extend(ready)
            num_made = sum(len(run.guesses) for run in runs)
            token_price = token_prices[min(num_made, len(token_prices) - 1)]
            ready = [run for run in ready if not run.is_done and run.next_gain >= token_price]
            gain = sum(run.next_gain - token_price for run in ready)
            if ready and gain < second_price * self._round_s(ready):
                break
        return [Draft(run.tokens, tuple(guess.belief for guess in run.guesses)) for run in runs]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """See Drafter. Nothing to learn: the reader compares what it read with what was emitted."""

    def forget(self, seq_id: int) -> None:
        """See Drafter. All memory is the reader's."""

    def _begin(self, runs: list[_Run]) -> list[_Run]:
        """Catch up with long unread stretches, the shortest first, as far as the budget goes; who is ready to guess."""
        budget = self.max_reading_tokens
        ready, partial = [], []
        for run in sorted(runs, key=lambda run: run.num_unread):
            if run.num_unread <= max(budget, 2):
                ready.append(run)
            elif budget > 0:
                stop = run.num_read + budget
                partial.append(Reading(run.request.seq_id, run.num_read, stop, guesses=False))
            budget -= min(budget, run.num_unread)
        if partial:
            self._read(partial, sum(reading.stop for reading in partial))
        return ready

    def _extend(self, runs: Sequence[_Run]) -> None:
        """One more guess for each run."""
        readings = [self._reading(run) for run in runs]
        guesses = self._read(readings, sum(reading.stop for reading in readings))
        for run, reading, guess in zip(runs, readings, guesses, strict=True):
            assert guess is not None
            run.num_read = reading.stop
            run.guesses.append(guess)
            beliefs = [one.belief for one in run.guesses]
            survival = prod(self._acceptance.rates(run.request.seq_id, beliefs))
            run.next_gain = survival * self._acceptance.expected(run.request.seq_id, len(beliefs) + 1)[-1]

    def _round_s(self, runs: Sequence[_Run]) -> float:
        """Seconds that another round takes, as believed."""
        num_kv_tokens = sum(len(run.request.token_ids) for run in runs)
        return float(self._cost.predict(len(runs), len(runs), num_kv_tokens)) if self._cost.is_known else 0.0

    def _reading(self, run: _Run) -> Reading:
        stop = len(run.request.token_ids) + len(run.guesses)
        return Reading(run.request.seq_id, run.num_read, stop, run.tokens)

    def _read(self, readings: Sequence[Reading], num_kv_tokens: int) -> list[Guess | None]:
        started = time.perf_counter()
        guesses = self._reader.read(readings)
        elapsed_s = time.perf_counter() - started
        self._cost.observe(sum(one.num_tokens for one in readings), len(readings), num_kv_tokens, elapsed_s)
        return guesses
