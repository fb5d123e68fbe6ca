"""Who runs when in `benchmarks.speculation`, so that what is compared ran under like conditions, and equally often.

Jobs change after each batch: a machine whose speed drifts slows all of them. First all take turns, several of them
those that the claims rest on, plain and adaptive. Then the fixed lengths of each drafter are weeded out by successive
halving (Karnin, Koren, Somekh 2013), with plain and adaptive beside them: the fastest of eight lengths that ran once
each is the luckiest one, and only running again tells how fast it is.
"""

from __future__ import annotations

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

Runs = list[list[list[Measured]]]


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


def take_turns(jobs: Sequence[Job], batches: Sequence[tuple[Prompt, ...]], rounds: int) -> Runs:
    """For each job its turns, at least `rounds`: what was measured with each batch."""
    runs: Runs = [[] for _ in jobs]
    everyone = range(len(jobs))
    num_turns = _NUM_TURNS if len(batches[0]) < MANY_SEQUENCES else _NUM_TURNS_OF_MANY
    for number in range(rounds):
        _pass(jobs, everyone, batches, runs, num_turns, f"{number}")
    claimed = [number for number in everyone if jobs[number].is_claimed]
    left = [number for number in everyone if jobs[number].is_own and not jobs[number].is_claimed]
    for times in _HALVINGS:
        left = _faster_half(jobs, left, runs)
        for number in range(times if left else 0):
            _pass(jobs, claimed + left, batches, runs, 1, f"final {times} {number}")
    return runs


def speed(runs: Sequence[Measured]) -> float:
    """Tokens per second of all runs together."""
    return sum(one.num_tokens for one in runs) / sum(one.seconds for one in runs)


def _pass(
    jobs: Sequence[Job],
    numbers: Sequence[int],
    batches: Sequence[tuple[Prompt, ...]],
    runs: Runs,
    num_turns: int,
    seed: str,
) -> None:
    """A turn for each of the numbered jobs, `num_turns` for the claimed ones: every batch once."""
    turns: Runs = [[[] for _ in range(num_turns if job.is_claimed else 1)] for job in jobs]
    for place, batch in enumerate(batches):
        for turn, number in _order(jobs, numbers, num_turns, random.Random(f"{seed} {place}")):
            turns[number][turn if jobs[number].is_claimed else 0].append(jobs[number].run(batch))
    for number in numbers:
        runs[number] += turns[number]


def _order(
    jobs: Sequence[Job], numbers: Sequence[int], num_turns: int, draw: random.Random
) -> Iterator[tuple[int, int]]:
    """Turns and who has them: each claimed job every turn, of the others a share, so that rivals run close together."""
    claimed = [number for number in numbers if jobs[number].is_claimed]
    others = draw.sample(rest := [number for number in numbers if number not in claimed], len(rest))
    for turn in range(num_turns):
        part = claimed + others[turn::num_turns]
        yield from ((turn, number) for number in draw.sample(part, len(part)))


def _faster_half(jobs: Sequence[Job], numbers: Sequence[int], runs: Runs) -> list[int]:
    """Of the numbered jobs of each drafter the faster ones, at least one."""

    def rate(number: int) -> float:
        return speed([one for run in runs[number] for one in run])

    kept: list[int] = []
    for drafter in dict.fromkeys(jobs[number].drafter for number in numbers):
        own = sorted((number for number in numbers if jobs[number].drafter == drafter), key=rate, reverse=True)
        kept += own[: (len(own) + 1) // 2]
    return kept
