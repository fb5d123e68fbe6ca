"""The text of one output as a client may see it: whole characters, and nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.errors import InvalidRequestError
from engines.tokenizer import IncrementalDetokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """`text` became certain. `num_tokens` of the pushed ids were used: fewer than pushed only where `stop` ended it."""

    text: str
    num_tokens: int
    stop: str | None = None


class TextStream:
    """Detokenizes one output and cuts it before the first stop string.

    First is the one that is complete first, since generation ends there; of two that end together, the longer. So the
    result does not depend on how the text falls into tokens and pushes. Raises InvalidRequestError for an empty stop
    string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], prompt_token_ids: Sequence[int] = ()) -> None:
        if "" in stop:
            raise InvalidRequestError("A stop string cannot be empty.", "stop")
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids)
        self._stop = stop
        self._max_held = max(map(len, stop), default=1) - 1
        self._held = ""
        self._is_stopped = False

    def push(self, token_ids: Sequence[int]) -> TextUpdate:
        """What can be shown after these tokens. Not to be called again after `stop` was set."""
        assert not self._is_stopped
        if not self._stop:
            return TextUpdate(self._detokenizer.push(token_ids), len(token_ids))
        texts = []
        for num_tokens, token_id in enumerate(token_ids, 1):
            self._held += self._detokenizer.push((token_id,))
            match = self._first_match()
            if match is not None:
                start, stop = match
                texts.append(self._held[:start])
                self._held, self._is_stopped = "", True
                return TextUpdate("".join(texts), num_tokens, stop)
            texts.append(self._release())
        return TextUpdate("".join(texts), len(token_ids))

    def finish(self) -> str:
        """Everything held back, at an end that is not a stop string; "" after a stop string."""
        if self._is_stopped:
            return ""
        rest, self._held = self._held + self._detokenizer.finish(), ""
        return rest

    def _first_match(self) -> tuple[int, str] | None:
        """Where the first complete stop string begins in the held text, and which it is."""
        found = [(start, stop) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _release(self) -> str:
        """Take the held text, except its longest end that may begin a stop string."""
        held = self._held
        starts = range(max(0, len(held) - self._max_held), len(held))
        keep = next((start for start in starts if any(s.startswith(held[start:]) for s in self._stop)), len(held))
        self._held = held[keep:]
        return held[:keep]
