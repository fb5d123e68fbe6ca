"""Which model a conversation has, found again by the conversation itself: nobody sends an id.

The next request of a conversation repeats the messages of the last one. What is remembered has the digest of the
messages up to a user's turn as its key, so the newest earlier turn that is known tells the model. Two conversations
that begin alike share what is remembered for as long as they are alike, and so they do the warm prefix.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from router_models.prompt import Prompt

Key = bytes


@dataclass(frozen=True, slots=True)
class Conversation:
    """`model` that it has, how many turns in a row wanted a lesser one, and tokens of it in that model's cache."""

    model: str
    turns_below: int = 0
    warm_tokens: int = 0


class Conversations:
    """The conversations of this process that were active lately. Used from one event loop."""

    def __init__(self, max_conversations: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_conversations = max_conversations
        self._ttl_s = ttl_s
        self._clock = clock
        self._known: OrderedDict[Key, tuple[float, Conversation]] = OrderedDict()

    def find(self, keys: list[Key]) -> Conversation | None:
        """What the latest of these turns is known to have; `keys` as of `turn_keys`, the request's own turn last."""
        for key in reversed(keys[:-1]):
            seen_s, found = self._known.get(key, (0.0, None))
            if found is not None and self._clock() - seen_s <= self._ttl_s:
                return found
        return None

    def keep(self, key: Key, conversation: Conversation) -> None:
        """Remember a turn, and forget the oldest beyond the limit."""
        self._known[key] = self._clock(), conversation
        self._known.move_to_end(key)
        while len(self._known) > self._max_conversations:
            self._known.popitem(last=False)

    def warmed(self, key: Key, num_tokens: int) -> None:
        """The turn was answered: so many tokens, prompt and answer, are in its model's cache now."""
        if key in self._known:
            self.keep(key, replace(self._known[key][1], warm_tokens=num_tokens))


def turn_keys(tenant: str, prompt: Prompt) -> list[Key]:
    """A digest for each user's turn, over all that was said up to it. Other tenants have other digests."""
    digest, keys = hashlib.sha256(repr(tenant).encode(errors="replace")), []
    for turn in prompt.turns:
        data = turn.text.encode(errors="replace")
        digest.update(f"\0{turn.role}\0{len(data)}\0".encode() + data)
        if turn.role == "user":
            keys.append(digest.digest())
    return keys
