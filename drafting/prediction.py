"""Drafts from the client's own expectation of the output (OpenAI's predicted outputs), followed with a cursor.

The draft is the prediction from the cursor on. Output that departs from it leaves the cursor behind: we are *lost*, and
draft nothing until the newest output tokens occur in the prediction again, which takes in edits, insertions, deletions
and a start that differs (reference copying with re-matching: LLMA, arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drafting.match import longest_suffix_match
from drafting.protocol import Draft, DraftRequest, Verdict

_TRUSTED = 8  # tokens of agreement; a prediction starts with them
_NEAR_TOKENS = 64
_MAX_MATCH = 16
# Edits are mostly short, and their ends close by: a match elsewhere has to be longer by this much.
_FAR_HANDICAP = 3


class PredictionDrafter:
    """Follows `DraftRequest.prediction`; sequences without one get no drafts and leave no state."""

    def __init__(self) -> None:
        self._cursors: dict[int, Cursor] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """Nothing to learn: the next `propose` brings the tokens."""

    def forget(self, seq_id: int) -> None:
        self._cursors.pop(seq_id, None)

    def _draft(self, request: DraftRequest) -> Draft:
        if request.max_drafts == 0 or not request.prediction:
            return Draft()
        cursor = self._cursors.get(request.seq_id)
        if cursor is None:
            cursor = self._cursors[request.seq_id] = Cursor(request.prediction)
        cursor.follow(request.token_ids, request.num_prompt_tokens)
        return cursor.draft(request.max_drafts)


class Cursor:
    """One sequence's place in its prediction, which is not empty."""

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self._prediction = prediction
        self._array = np.array(prediction, dtype=np.int32)
        self._num_followed = 0  # output tokens
        self._next: int | None = 0  # the predicted token that comes next; None while lost
        self._trust = _TRUSTED  # tokens of agreement
        self._left_at = 0  # where we last left a part of the prediction that had deserved trust

    def follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Move along the output tokens that are new in `token_ids`, and look for a place where they leave us lost."""
        new = token_ids[num_prompt_tokens + self._num_followed :]
        for token_id in new:
            self._step(token_id)
        self._num_followed += len(new)
        if self._next is None and new:
            self._resynchronise(token_ids[max(num_prompt_tokens, len(token_ids) - _MAX_MATCH) :])

    def draft(self, max_drafts: int) -> Draft:
        """The prediction from here on, at most `max_drafts` tokens of it; empty while lost or past its end."""
        if self._next is None:
            return Draft()
        token_ids = self._prediction[self._next : self._next + max_drafts]
        trusts = range(self._trust, self._trust + len(token_ids))
        return Draft(token_ids, tuple(trust / (trust + 1) for trust in trusts))

    def _step(self, token_id: int) -> None:
        if self._next is None:
            return
        if self._next < len(self._prediction) and self._prediction[self._next] == token_id:
            self._next += 1
            self._trust += 1
            return
        if self._trust >= _TRUSTED:  # else the place was wrong, and the one before is the better guide
            self._left_at = self._next
        self._next = None

    def _resynchronise(self, newest: Sequence[int]) -> None:
        """Go on where the longest match with the newest output tokens ends: near where we left, or else anywhere."""
        suffix = np.array(newest, dtype=np.int32)
        near = longest_suffix_match(self._array[self._left_at : self._left_at + _NEAR_TOKENS], suffix)
        far = longest_suffix_match(self._array, suffix)
        if far.length > near.length + _FAR_HANDICAP:
            ahead = far.ends[far.ends >= self._left_at]
            self._next, self._trust = int(ahead[0] if len(ahead) else far.ends[-1]), far.length
        elif near.length > 0:
            self._next, self._trust = self._left_at + int(near.ends[0]), near.length
