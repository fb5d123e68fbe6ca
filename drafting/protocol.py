"""The seam between the engine step and whatever guesses ahead (speculative decoding: arXiv 2211.17192, 2302.01318)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Wanted: up to `num_drafts` drafts after `token_ids` (prompt and output; neither to be kept nor changed)."""

    seq_id: int
    token_ids: Sequence[int]
    num_drafts: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a sequence's drafts: the first `num_accepted` of `drafts` stood."""

    seq_id: int
    drafts: tuple[int, ...]
    num_accepted: int


class Drafter(Protocol):
    """Guesses the next tokens. Any guess is safe: what is emitted is the target's own sample."""

    def limit(self, seq_id: int, num_tokens: int) -> int:
        """How many drafts it would make for a sequence of `num_tokens` known tokens; 0 for none."""
        ...

    def propose(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...]]:
        """Drafts for each request, in order, at most `num_drafts` each; fewer, or none, is always allowed."""
        ...

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """Learn from a step's verdicts."""
        ...

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended."""
        ...
