"""Real agent sessions as prompts that grow, cut to a small model's context.

A session file has one JSON object a line with `messages`: a system prompt, then turns of a user, an assistant and its
tools. Each turn of the assistant is one call, whose prompt is everything before it. What is cut is the length of each
message, not their number or order: calls of a session share a growing prefix, and all sessions the beginning.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """One model call: the prompt, and how many tokens the assistant said (at most what the cut left)."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How long what may be, in tokens. A session ends where the next prompt and answer would not fit `context`."""

    context: int = 2048
    system: int = 512
    message: int = 96
    output: int = 16


def read_sessions(path: Path, encode: Callable[[str], Sequence[int]], cut: Cut) -> list[list[Call]]:
    """The sessions of a .jsonl or .jsonl.gz file, in its order. Raises ValueError naming what cannot be read."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        try:
            sessions = [list(_calls(json.loads(line)["messages"], encode, cut)) for line in lines if line.strip()]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: not a file of agent sessions: {error!r}") from error
    return [session for session in sessions if session]


def _calls(messages: list[dict[str, Any]], encode: Callable[[str], Sequence[int]], cut: Cut) -> Iterator[Call]:
    history: list[int] = []
    for message in messages:
        role = message["role"]
        tokens = encode(_text(message))[: cut.system if role == "system" else cut.message]
        if role == "assistant" and history:
            output = min(max(len(tokens), 1), cut.output)
            if len(history) + output > cut.context:
                return
            yield Call(tuple(history), output)
        history += tokens


def _text(message: dict[str, Any]) -> str:
    """Role, words and tool calls, as a template would show them."""
    said = message.get("content") or ""
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls") or ()]
    return "\n".join([f"{message['role']}:", said, *calls, ""])
