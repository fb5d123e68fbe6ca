"""Finding where the newest tokens occurred before: the search that the lookup drafters share.

Terms: a *match* is a place in a text whose tokens equal the last ones of another (or of the same) text; its *end* is
the index just past it, where what followed begins; its *length* counts the equal tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
_MAX_DENSE_LEVELS = 8


class GrowingTokens:
    """A sequence's tokens as an array that grows at its end, so that a step copies its new tokens only (amortised)."""

    def __init__(self) -> None:
        self._buffer: TokenArray = np.empty(0, dtype=np.int32)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def view(self) -> TokenArray:
        """All tokens, int32 [len(self)]; holds until the next `catch_up`, and is not to be written."""
        return self._buffer[: self._size]

    def catch_up(self, token_ids: Sequence[int]) -> None:
        """Append the part of `token_ids` beyond our own length; what comes before is taken to be what we have."""
        new = token_ids[self._size :]
        size = self._size + len(new)
        if size > len(self._buffer):
            grown = np.empty(max(64, size + size // 2), dtype=np.int32)
            grown[: self._size] = self.view
            self._buffer = grown
        self._buffer[self._size : size] = new
        self._size = size


@dataclass(frozen=True, slots=True)
class Match:
    """The longest match found: its length in tokens (0: none) and its ends, ascending, int64 [num_matches]."""

    length: int
    ends: NDArray[np.int64]


_NO_MATCH = Match(0, np.empty(0, dtype=np.int64))


def longest_suffix_match(text: TokenArray, suffix: TokenArray, max_matches: int = 64) -> Match:
    """Where the longest tail of `suffix` ends in `text`: both int32, [num_tokens] and [max_length].

    To find where a sequence repeats itself, `text` is the sequence without its last token: matches may overlap.
    Where more than `max_matches` places share the last few tokens (eight, if so many match at all), only the latest
    `max_matches` of them are looked at, so that a text of one token over and over costs about what others do.
    """
    depth = min(len(text), len(suffix))
    if depth == 0:
        return _NO_MATCH
    ends, level = _candidate_ends(text, suffix, min(depth, _MAX_DENSE_LEVELS), max_matches)
    if len(ends) == 0:
        return _NO_MATCH
    if level == depth:
        return Match(level, ends)
    lengths = _match_lengths(text, suffix[len(suffix) - depth :], ends)
    length = int(lengths.max())
    return Match(length, ends[lengths == length])


def _candidate_ends(
    text: TokenArray, suffix: TokenArray, max_level: int, max_matches: int
) -> tuple[NDArray[np.int64], int]:
    """Ends of matches with the last `level` tokens, and that level: the first with at most `max_matches`.

    Scans the whole text once per level, which for many places is cheaper than following each one. If the next level
    has none at all, or there is none, the latest `max_matches` of this one.
    """
    hits, level = text == suffix[-1], 1
    while level < max_level and np.count_nonzero(hits) > max_matches:
        longer = hits[1:] & (text[: len(text) - level] == suffix[-1 - level])
        if not longer.any():
            break
        hits, level = longer, level + 1
    return np.flatnonzero(hits)[-max_matches:] + level, level


def _match_lengths(text: TokenArray, suffix: TokenArray, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Length of the match at each end, at most len(suffix), int64 [num_ends]."""
    # Rather a row of windows than a loop over levels: copied text matches as far back as we look.
    places = ends[:, None] + np.arange(-len(suffix), 0)
    differs = (text[np.maximum(places, 0)] != suffix) | (places < 0)
    lengths: NDArray[np.int64] = np.where(differs.any(axis=1), differs[:, ::-1].argmax(axis=1), len(suffix))
    return lengths


def continuations(text: TokenArray, ends: NDArray[np.int64], num_tokens: int) -> TokenArray:
    """The `num_tokens` tokens that follow each end, int32 [num_ends, num_tokens].

    A continuation that runs into the end of `text` goes on with its own beginning: the text's newest tokens, which
    matched there, repeat with that period. Every end lies below len(text).
    """
    periods = len(text) - ends
    return text[ends[:, None] + np.arange(num_tokens) % periods[:, None]]
