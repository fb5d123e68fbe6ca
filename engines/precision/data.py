"""Evaluation sets: JSON lines, each with text to be scored, or a prompt with what should follow it.

    {"text": "..."}                                            every token but the first is scored
    {"prompt": "...", "reference": "...", "answer": "..."}     the reference's tokens are scored, after the prompt
    {"messages": [{"role": "user", "content": "..."}], ...}    the same, after the model's chat template

`reference` and `answer` are optional. The model's greedy answer to a prompt is compared with `answer`, or without one
with `reference`. Other keys are kept for a scorer. Blank lines are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import EvaluationError
from engines.types import ChatMessage

_SOURCES = ("text", "prompt", "messages")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an evaluation set; exactly one of `text`, `prompt` and `messages` is there. Lines count from 1."""

    line: int
    text: str | None
    prompt: str | None
    messages: tuple[ChatMessage, ...] | None
    reference: str | None
    answer: str | None
    fields: Mapping[str, Any]

    @property
    def expected(self) -> str | None:
        """What a greedy answer is compared with."""
        return self.reference if self.answer is None else self.answer


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a file, all without a limit.

    Raises EvaluationError, naming the line, for a row that is not as described above, and for a file that cannot be
    read or has no rows.
    """
    rows: list[Row] = []
    for line, text in _lines(path):
        if limit is not None and len(rows) == limit:
            break
        try:
            rows.append(_row(line, text))
        except ValueError as error:
            raise EvaluationError(f"{path}, line {line}: {error}") from error
    if not rows:
        raise EvaluationError(f"{path} has no rows.")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, text) for number, text in enumerate(file, 1) if text.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from error


def _row(line: int, text: str) -> Row:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(fields, dict):
        raise ValueError("a row is a JSON object.")
    given = [name for name in _SOURCES if name in fields]
    if len(given) != 1:
        raise ValueError(f"a row has one of text, prompt and messages, and this has {' and '.join(given) or 'none'}.")
    if given == ["text"] and (extra := fields.keys() & {"reference", "answer"}):
        raise ValueError(f"a row with text is scored in full and takes no {sorted(extra)[0]}.")
    return Row(
        line=line,
        text=_string(fields, "text"),
        prompt=_string(fields, "prompt"),
        messages=_messages(fields["messages"]) if "messages" in fields else None,
        reference=_string(fields, "reference"),
        answer=_string(fields, "answer"),
        fields=fields,
    )


def _string(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if name in fields and not (isinstance(value, str) and value):
        raise ValueError(f"{name} is to be a string that is not empty.")
    return value


def _messages(turns: object) -> tuple[ChatMessage, ...]:
    if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
        raise ValueError("messages is to be a list of objects, at least one.")
    for turn in turns:
        if turn.keys() != {"role", "content"} or not all(isinstance(value, str) for value in turn.values()):
            raise ValueError("a message has a role and a content, both strings, and nothing else.")
    return tuple(ChatMessage(turn["role"], turn["content"]) for turn in turns)
