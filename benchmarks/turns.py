"""Who runs when in `benchmarks.speculation`, so that what is compared ran under like conditions, and equally often.

Jobs change after each batch: a machine whose speed drifts slows all of them. First all take turns, several of them
those that the claims rest on, plain and adaptive. Then the fixed lengths of each drafter are weeded out by successive
halving (Karnin, Koren, Somekh 2013), with plain and adaptive beside them: the fastest of eight lengths that ran once
each is the luckiest one, and only running again tells how fast it is. All that is one *pass* over the batches after
another; what two jobs did is compared within a pass, since the machine differs from pass to pass.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.speculation_systems import Length, Measured
from benchmarks.workloads import Prompt

# Large batches say as much in fewer steps, but those are soon over: what the claims rest on takes more turns.
MANY_SEQUENCES = 16
_NUM_TURNS, _NUM_TURNS_OF_MANY = 2, 4
# After the half that was slower is dropped, those left are run again so many times.
_HALVINGS = (1, 2)

# What a job measured in each pass that it took part in, by the pass's number.
Runs = dict[int, list[Measured]]


@dataclass(frozen=True, slots=True)
class Job:
    """One system under one setting: what its row says of it, and how it decodes a batch."""

    system: str
    drafter: str
    length: Length
    run: Callable[[tuple[Prompt, ...]], Measured]

    @property
    def is_own(self) -> bool:
        """Whether it is ours and no peer."""
        return self.system == "outrider"

    @property
    def is_claimed(self) -> bool:
        """Whether the claims are about it: plain decoding and adaptive lengths."""
        return self.is_own and self.length in (0, "adaptive")


def take_turns(jobs: Sequence[Job], batches: Sequence[tuple[Prompt, ...]], rounds: int) -> list[Runs]:
    """What each job measured, in `rounds` passes of all and in those of the halvings."""
    runs: list[Runs] = [{} for _ in jobs]
    everyone = range(len(jobs))
    num_turns = _NUM_TURNS if len(batches[0]) < MANY_SEQUENCES else _NUM_TURNS_OF_MANY
    for number in range(rounds):
        _pass(number, jobs, everyone, batches, runs, num_turns)
    claimed = [number for number in everyone if jobs[number].is_claimed]
    left = [number for number in everyone if jobs[number].is_own and not jobs[number].is_claimed]
    passes = itertools.count(rounds)
    for times in _HALVINGS:
        left = _faster_half(jobs, left, runs)
        for number in itertools.islice(passes, times if left else 0):
            _pass(number, jobs, claimed + left, batches, runs, num_turns=1)
    return runs


def speed(runs: Sequence[Measured]) -> float:
    """Tokens per second of all runs together."""
    return sum(one.num_tokens for one in runs) / sum(one.seconds for one in runs)


def _pass(
    number: int,
    jobs: Sequence[Job],
    chosen: Sequence[int],
    batches: Sequence[tuple[Prompt, ...]],
    runs: Sequence[Runs],
    num_turns: int,
) -> None:
    """Every batch once by each of the chosen jobs, `num_turns` times by the claimed ones."""
    for place, batch in enumerate(batches):
        for job in _order(jobs, chosen, num_turns, random.Random(f"{number} {place}")):
            runs[job].setdefault(number, []).append(jobs[job].run(batch))


def _order(jobs: Sequence[Job], chosen: Sequence[int], num_turns: int, draw: random.Random) -> Iterator[int]:
    """Every turn has each claimed job once, and a share of the others: what is compared runs close together."""
    claimed = [number for number in chosen if jobs[number].is_claimed]
    others = draw.sample(rest := [number for number in chosen if number not in claimed], len(rest))
    for turn in range(num_turns):
        part = claimed + others[turn::num_turns]
        yield from draw.sample(part, len(part))


def _faster_half(jobs: Sequence[Job], numbers: Sequence[int], runs: Sequence[Runs]) -> list[int]:
    """Of the numbered jobs of each drafter the faster ones, at least one."""

    def rate(number: int) -> float:
        return speed([one for measured in runs[number].values() for one in measured])

    kept: list[int] = []
    for drafter in dict.fromkeys(jobs[number].drafter for number in numbers):
        own = sorted((number for number in numbers if jobs[number].drafter == drafter), key=rate, reverse=True)
        kept += own[: (len(own) + 1) // 2]
    return kept
