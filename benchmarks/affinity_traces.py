"""Request logs with prefix identity, as `benchmarks.affinity` replays them.

Three formats, gzipped or not. `.jsonl`, as Mooncake publishes them: `timestamp` (ms), `input_length`, `output_length`,
`hash_ids` (one for each block of 512 tokens, the last one partial; equal ids are equal prefixes). `.csv`, as Azure
publishes them: `TIMESTAMP,ContextTokens,GeneratedTokens`; no two requests share anything. `.jsonl` with `messages`, as
tau-bench publishes sessions of agents: each assistant message was a call, with all messages before it as its prompt.
Sessions say no times and no tokens: four characters count as a token, a session begins every ten seconds on average,
and the next call comes two seconds and 40 ms for each output token after the last.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

BLOCK_SIZE = 512
_TOKEN_CHARACTERS = 4
_SESSION_S = 10.0
_TOOL_S = 2.0
_OUTPUT_TOKEN_S = 0.04


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `at_s` counts from the first; `blocks` are ids of its blocks in order."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests by time. Raises ValueError naming what cannot be read."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    readers = {".jsonl": _read_hashed, ".csv": _read_plain}
    if suffix not in readers:
        raise ValueError(f"{path.name}: a trace ends in .jsonl or .csv, or in one of these and .gz")
    with _open(path) as lines:
        try:
            requests = sorted(readers[suffix](lines), key=lambda each: each.at_s)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: not a trace: {error!r}") from error
    if not requests:
        raise ValueError(f"{path.name}: no requests")
    start = requests[0].at_s
    return [TraceRequest(each.at_s - start, each.prompt_tokens, each.output_tokens, each.blocks) for each in requests]


def span_s(requests: Sequence[TraceRequest]) -> float:
    """From the first request to the last; never zero."""
    return max(requests[-1].at_s, 1e-3)


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_hashed(lines: TextIO) -> Iterator[TraceRequest]:
    rows = map(json.loads, lines)
    sessions: list[list[dict[str, Any]]] = []
    for row in rows:
        if "messages" in row:
            sessions.append(row["messages"])
            continue
        blocks = tuple(map(int, row["hash_ids"]))
        yield TraceRequest(row["timestamp"] / 1000, max(row["input_length"], 1), row["output_length"], blocks)
    yield from _calls(sessions, random.Random(0))


def _calls(sessions: Sequence[list[dict[str, Any]]], rng: random.Random) -> Iterator[TraceRequest]:
    ids: dict[str, int] = {}
    start_s = 0.0
    for messages in sessions:
        start_s += rng.expovariate(1 / _SESSION_S)
        at_s, text = start_s, ""
        for message in messages:
            words = json.dumps(message)
            if message["role"] == "assistant" and text:
                output_tokens = len(words) // _TOKEN_CHARACTERS
                yield TraceRequest(at_s, max(len(text) // _TOKEN_CHARACTERS, 1), output_tokens, _text_blocks(text, ids))
                at_s += _TOOL_S + output_tokens * _OUTPUT_TOKEN_S
            text += words


def _text_blocks(text: str, ids: dict[str, int]) -> tuple[int, ...]:
    """A block is what is before its end, so that equal ids are equal prefixes."""
    size = BLOCK_SIZE * _TOKEN_CHARACTERS
    return tuple(ids.setdefault(text[: start + size], len(ids)) for start in range(0, len(text), size))


def _read_plain(lines: TextIO) -> Iterator[TraceRequest]:
    first = 0
    for row in csv.DictReader(lines):
        at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=datetime.UTC)
        tokens = max(int(row["ContextTokens"]), 1)
        blocks = tuple(range(first, first + -(-tokens // BLOCK_SIZE)))
        first += len(blocks)
        yield TraceRequest(at.timestamp(), tokens, int(row["GeneratedTokens"]), blocks)
