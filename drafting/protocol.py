"""The seams of drafting: what a drafter is asked, what it answers, what it learns (speculative decoding: 2211.17192).

Words: a *draft* is a run of guessed tokens after a sequence's newest one. The target *verifies* it; the leading tokens
that equal the target's own samples are *accepted*. A *source* is the drafter that a draft came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Source = Literal["ngram", "suffix", "prediction", "model"]
SOURCES: tuple[Source, ...] = ("prediction", "ngram", "suffix", "model")


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """A decoding sequence that may be drafted for, by at most `max_drafts` tokens.

    `token_ids` are its prompt and output, all verified; they are the sequence's own list, neither to be changed nor to
    be kept beyond the call. `num_left` output tokens are still allowed. `source` restricts the choice of drafter, None
    leaves it open. `tenant`: whose earlier outputs may be looked at; None: nobody's. `prediction` is what the client
    expects the output to be.
    """

    seq_id: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_drafts: int
    num_left: int = 2**31
    source: Source | None = None
    tenant: str | None = ""
    prediction: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens and, for each, the drafter's own belief in it, in [0, 1]: any monotone score will do.

    Beliefs are conditional on the tokens before being right. What they are worth is learnt from verdicts.
    """

    token_ids: tuple[int, ...] = ()
    beliefs: tuple[float, ...] = ()

    def first(self, count: int) -> Draft:
        """The draft's first `count` tokens."""
        return Draft(self.token_ids[:count], self.beliefs[:count])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step brought a sequence: the last `num_new` of `token_ids` were emitted by it.

    `draft` was verified (empty: nothing was), and its first `num_accepted` tokens stood. `token_ids` and the other
    fields are as in DraftRequest.
    """

    seq_id: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_new: int
    draft: Draft = Draft()
    source: Source | None = None
    num_accepted: int = 0
    tenant: str | None = ""

    @property
    def was_decoding(self) -> bool:
        """Whether these were not the sequence's first tokens."""
        return len(self.token_ids) - self.num_new > self.num_prompt_tokens


class Drafter(Protocol):
    """Guesses the next tokens. Any guess is safe: what is emitted is the target's own sample. One thread calls."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """A draft for each request, in order, at most `max_drafts` tokens each; fewer, or none, is always allowed."""
        ...

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """Learn from a step: called once per step with all sequences that emitted tokens, drafted for or not."""
        ...

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended; unknown ones are ignored."""
        ...
