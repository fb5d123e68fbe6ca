"""What the router sees of a request: the whole conversation, and what the caller asked of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
# Beyond this the features stop changing, and a decision has to stay within milliseconds.
MAX_CHARS = 8_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. Parts that are not text are left out by whoever builds it."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the router sees it. `max_tokens` None means that the caller set no limit.

    `structure`: its structural features as they were when it was served, in the order of FEATURE_NAMES, where a log has
    kept them; they then count in place of those of `turns`, which a log may have redacted or not kept.
    """

    turns: tuple[Turn, ...]
    max_tokens: int | None = None
    num_tools: int = 0
    response_format: Literal["text", "json"] = "text"
    structure: tuple[float, ...] | None = field(default=None, repr=False)

    @classmethod
    def from_text(cls, text: str) -> Prompt:
        """A conversation of one user message."""
        return cls((Turn("user", text),))

    @property
    def user_turns(self) -> list[str]:
        return [turn.text for turn in self.turns if turn.role == "user"]

    @property
    def last_user_text(self) -> str:
        turns = self.user_turns
        return turns[-1] if turns else ""

    @property
    def text(self) -> str:
        """What the user has written so far, newest last; the oldest goes first when it is too long.

        "ok, do it" is as hard as what it refers to, so the last message alone is not the request. Of a single
        message that is too long, the middle goes: instructions stand at its start or its end.
        """
        *earlier, last = self.user_turns or [""]
        kept = [_without_middle(last)]
        room = MAX_CHARS - len(kept[0])
        for turn in reversed(earlier):
            if room <= 0:
                break
            kept.append(turn[-room:])
            room -= len(kept[-1]) + 1
        return "\n".join(reversed(kept))


def _without_middle(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[: half - 1]}\n{text[-half:]}"
