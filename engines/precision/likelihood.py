"""Log-likelihood of given tokens under a served model (teacher forcing), through its own paged forward.

Tokens go in by chunks, so that all but a chunk's own keys and values are read back from the KV cache as it stores them:
what an 8-bit cache loses shows, and so does whatever the attention backend does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.batch import BatchItem, build_batch
from engines.model_runner import Runner
from engines.precision.examples import Example

CHUNK_TOKENS = 64
_MAX_SEQUENCES = 4  # bounds the logits of a step: 256 rows of the whole vocabulary, in fp32


@dataclass(frozen=True, slots=True)
class Likelihood:
    """`nats` is minus the log-likelihood of a row's scored tokens; `best` the model's first choice at each of them."""

    nats: float
    best: tuple[int, ...]


@dataclass(slots=True)
class _Reading:
    """An example under way: its blocks, how many of its tokens are read, and what was found."""

    example: Example
    block_table: array[int]
    num_read: int = 0
    nats: float = 0.0
    best: list[int] = field(default_factory=list)

    @property
    def num_to_read(self) -> int:
        return len(self.example.token_ids) - 1  # nothing is asked after the last token

    @property
    def is_done(self) -> bool:
        return self.num_read >= self.num_to_read


@dataclass(frozen=True, slots=True)
class KVSpace:
    """The blocks that reading may overwrite: all of a cache that nobody else is using."""

    num_blocks: int
    block_size: int
    device: torch.device


def likelihoods(
    runner: Runner, examples: Sequence[Example], space: KVSpace, progress: Callable[[int], None] = lambda done: None
) -> list[Likelihood]:
    """One for each example, in order. Overwrites the KV cache; `progress` is told how many rows are done.

    An example without scored tokens has none of either. Each example must fit `space` by itself.
    """
    found: list[Likelihood] = []
    for group in _groups(examples, space):
        readings = _open(group, space.block_size)
        while under_way := [reading for reading in readings if reading.example.num_scored and not reading.is_done]:
            _step(runner, under_way, space)
        found += [Likelihood(reading.nats, tuple(reading.best)) for reading in readings]
        progress(len(found))
    return found


def _groups(examples: Sequence[Example], space: KVSpace) -> Iterator[list[Example]]:
    """Neighbouring examples that fit the cache together."""
    group: list[Example] = []
    num_blocks = 0
    for example in examples:
        needed = _num_blocks(example, space.block_size)
        if group and (len(group) == _MAX_SEQUENCES or num_blocks + needed > space.num_blocks):
            yield group
            group, num_blocks = [], 0
        group.append(example)
        num_blocks += needed
    if group:
        yield group


def _num_blocks(example: Example, block_size: int) -> int:
    return -(-len(example.token_ids) // block_size)


def _open(group: Sequence[Example], block_size: int) -> list[_Reading]:
    readings, first = [], 0
    for example in group:
        stop = first + _num_blocks(example, block_size)
        readings.append(_Reading(example, array("i", range(first, stop))))
        first = stop
    return readings


def _step(runner: Runner, readings: Sequence[_Reading], space: KVSpace) -> None:
    """Read the next chunk of each."""
    items = [_item(reading) for reading in readings]
    logits = runner.forward(build_batch(items, space.block_size, space.device))
    for reading, item, rows in zip(
        readings, items, torch.split(logits, [item.num_logit_rows for item in items]), strict=True
    ):
        reading.num_read = item.stop
        if item.num_logit_rows:
            _take(reading, rows, item.stop)


def _item(reading: _Reading) -> BatchItem:
    start = reading.num_read
    stop = min(start + CHUNK_TOKENS, reading.num_to_read)
    num_rows = max(0, stop - max(start, reading.example.first_scored - 1))
    return BatchItem(reading.example.token_ids, start, stop, (), reading.block_table, num_rows)


def _take(reading: _Reading, logits: Tensor, stop: int) -> None:
    """Note what `logits` [num_rows, vocab], of the tokens before `stop`, say of the tokens that follow them."""
    scores = logits.float()
    targets = torch.tensor(reading.example.token_ids[stop + 1 - len(scores) : stop + 1], device=scores.device)
    chosen = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    reading.nats += (scores.logsumexp(dim=1) - chosen).double().sum().item()
    reading.best += scores.max(dim=1).indices.tolist()
