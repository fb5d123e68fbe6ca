"""Request logs with prefix identity, as `benchmarks.affinity` replays them.

Two formats, told apart by name, gzipped or not. `.jsonl`, as Mooncake publishes them: `timestamp` (ms), `input_length`,
`output_length`, `hash_ids` (one for each block of 512 tokens, the last one partial; equal ids are equal prefixes).
`.csv`, as Azure publishes them: `TIMESTAMP,ContextTokens,GeneratedTokens`; no two requests share anything.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

BLOCK_SIZE = 512


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
    for line in lines:
        row = json.loads(line)
        blocks = tuple(map(int, row["hash_ids"]))
        yield TraceRequest(row["timestamp"] / 1000, max(row["input_length"], 1), row["output_length"], blocks)


def _read_plain(lines: TextIO) -> Iterator[TraceRequest]:
    first = 0
    for row in csv.DictReader(lines):
        at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=datetime.UTC)
        tokens = max(int(row["ContextTokens"]), 1)
        blocks = tuple(range(first, first + -(-tokens // BLOCK_SIZE)))
        first += len(blocks)
        yield TraceRequest(at.timestamp(), tokens, int(row["GeneratedTokens"]), blocks)
