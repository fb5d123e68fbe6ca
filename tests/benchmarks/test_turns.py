"""Who runs when, and how often."""

from __future__ import annotations

import pytest

from benchmarks.speculation_systems import Length, Measured
from benchmarks.turns import Job, take_turns
from benchmarks.workloads import Prompt

LENGTHS: tuple[Length, ...] = (1, 2, 3, 4, 5, 6, 7, 8)


class Contest:
    """Jobs that note when they ran; a fixed length is the faster, the longer it is."""

    def __init__(self, lengths: tuple[Length, ...] = LENGTHS) -> None:
        self.calls: list[tuple[str, Length]] = []
        self.jobs = [
            self._job("none", 0),
            *(self._job(drafter, length) for drafter in ("ngram", "model") for length in (*lengths, "adaptive")),
            self._job("model", "adaptive", "transformers"),
        ]

    def runs(self, num_batches: int, size: int, rounds: int = 1) -> dict[tuple[str, Length], list[int]]:
        """How many runs each of our jobs had in each of its passes."""
        batches = [tuple(Prompt((i,)) for i in range(size))] * num_batches
        runs = take_turns(self.jobs, batches, rounds)
        assert list(runs[-1]) == list(range(rounds)), "a peer takes no part in the halvings"
        assert list(runs[0]) == list(range(len(runs[0]))), "plain decoding is in every pass"
        return {
            (job.drafter, job.length): [len(measured) for measured in passes.values()]
            for job, passes in zip(self.jobs, runs, strict=True)
            if job.is_own
        }

    def _job(self, drafter: str, length: Length, system: str = "outrider") -> Job:
        def run(batch: tuple[Prompt, ...]) -> Measured:
            self.calls.append((drafter if system == "outrider" else system, length))
            return Measured(10, 1, 1, 1 / length if isinstance(length, int) and length else 1.0)

        return Job(system, drafter, length, run)


@pytest.mark.parametrize(("size", "num_turns"), [(4, 2), (16, 4)])
def test_what_is_claimed_runs_several_times_and_next_to_everybody(size: int, num_turns: int) -> None:
    contest = Contest()
    runs = contest.runs(num_batches=2, size=size)
    assert runs["none", 0] == runs["ngram", "adaptive"] == [2 * num_turns, 2, 2, 2]
    first = contest.calls[: 3 * num_turns + 17]
    assert len(set(first)) == 20, "everybody, before the batch changes"
    claimed = [call for call in first if call[1] in (0, "adaptive") and call[0] != "transformers"]
    assert all(len(set(claimed[start : start + 3])) == 3 for start in range(0, len(claimed), 3)), "in turn"


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_the_faster_half_runs_again_and_the_faster_half_of_those_twice(drafter: str) -> None:
    runs = Contest().runs(num_batches=2, size=1, rounds=2)
    assert [len(runs[drafter, length]) for length in LENGTHS] == [2, 2, 2, 2, 3, 3, 5, 5]


def test_without_fixed_lengths_there_is_nobody_to_run_again() -> None:
    assert Contest(lengths=()).runs(num_batches=1, size=1)["none", 0] == [2]
