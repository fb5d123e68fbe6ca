"""The gate: the lowest precision whose loss on an evaluation set rises by no more than a stated bound.

A candidate passes if the whole confidence interval of its relative increase in loss lies below the bound, so that noise
fails it. Of those that pass, the one that takes the fewest bytes is named: weights, and the KV cache of one sequence
as long as the baseline serves. The first candidate is the baseline; it is named when no other passes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.errors import EvaluationError, ModelLoadError
from engines.precision.bootstrap import MIN_ROWS
from engines.precision.candidates import Candidate
from engines.precision.data import Row
from engines.precision.findings import Finding, Settings, find
from engines.precision.measure import Measurement, Progress, measure

Measure = Callable[[Candidate, Sequence[Row], int, Progress], Measurement]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, the baseline's first, and the recommendation with its reason in a sentence."""

    findings: Sequence[Finding]
    num_rows: int
    num_scored_rows: int
    num_scored_tokens: int
    recommended: str
    reason: str

    @property
    def is_lower(self) -> bool:
        """Whether something below the baseline is recommended."""
        return self.recommended != self.findings[0].name


def run_gate(
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    settings: Settings,
    progress: Progress,
    measure: Measure = measure,
) -> Report:
    """Measure one candidate after the other, so that one model at a time is in memory, and judge.

    A candidate that cannot be loaded is a finding with its error. Raises ModelLoadError if that is the baseline, and
    EvaluationError for rows that cannot be used, or that leave nothing to score.
    """
    started = time.perf_counter()
    baseline = measure(candidates[0], rows, settings.max_new_tokens, progress)
    if not baseline.num_scored:
        raise EvaluationError("No row has a text or a reference, so there is no loss to compare.")
    if not math.isfinite(baseline.nats):
        raise EvaluationError(f"The loss of {candidates[0].name} is {baseline.nats}; nothing can be compared with it.")
    findings = [find(candidates[0].name, baseline, baseline, rows, settings, time.perf_counter() - started)]
    findings += [_compare(candidate, baseline, rows, settings, progress, measure) for candidate in candidates[1:]]
    num_scored_rows = sum(example.num_scored > 0 for example in baseline.examples)
    recommended, reason = judge(findings, num_scored_rows, settings)
    return Report(findings, len(rows), num_scored_rows, baseline.num_scored, recommended, reason)


def _compare(
    candidate: Candidate,
    baseline: Measurement,
    rows: Sequence[Row],
    settings: Settings,
    progress: Progress,
    measure: Measure,
) -> Finding:
    started = time.perf_counter()
    try:
        measurement = measure(candidate, rows, settings.max_new_tokens, progress)
    except ModelLoadError as error:
        _log.warning("%s cannot be measured: %s", candidate.name, error.message)
        return Finding(candidate.name, error=error.message)
    if not math.isfinite(measurement.nats):
        return Finding(candidate.name, error=f"its loss is {measurement.nats}")
    return find(candidate.name, measurement, baseline, rows, settings, time.perf_counter() - started)


def judge(findings: Sequence[Finding], num_scored_rows: int, settings: Settings) -> tuple[str, str]:
    """The recommended candidate's name, and why; the baseline, which comes first in `findings`, if nothing passes."""
    baseline, *others = findings
    if num_scored_rows < MIN_ROWS:
        return baseline.name, (
            f"{num_scored_rows} rows with something to score are too few for a confidence interval; "
            f"{MIN_ROWS} are needed."
        )
    assert baseline.total_bytes is not None, "the baseline was measured"
    passing = [
        (finding.total_bytes, finding.increase.high, finding.name)
        for finding in others
        if finding.passes and finding.total_bytes is not None and finding.increase is not None
    ]
    smallest = min(passing, default=None)
    if smallest is None or smallest[0] >= baseline.total_bytes:
        return baseline.name, (
            f"No smaller precision keeps its increase in loss below {settings.bound:.2%} at {settings.confidence:.0%} "
            "confidence."
        )
    total_bytes, high, name = smallest
    return name, (
        f"{name} takes {total_bytes / baseline.total_bytes:.0%} of the bytes of {baseline.name}, and its loss rises by "
        f"less than {settings.bound:.2%} (upper limit {high:+.2%}, {settings.confidence:.0%} interval)."
    )
