"""One candidate beside the baseline, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.precision.bootstrap import MIN_ROWS, Interval, relative_increase
from engines.precision.data import Row
from engines.precision.measure import Measurement
from engines.precision.scorer import Scorer, exact_matches, scores


@dataclass(frozen=True, slots=True)
class Settings:
    """`bound` is the allowed relative increase in loss (0.01 is 1 %), `confidence` that of its two-sided interval.

    Without `max_new_tokens` nothing is generated.
    """

    bound: float = 0.01
    confidence: float = 0.95
    max_new_tokens: int = 64
    scorer: Scorer | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One candidate beside the baseline; everything but `name` and `error` is None if it could not be measured.

    `loss` is in nats a token, `increase` relative to the baseline's, with its interval; None of the baseline, and
    where there are too few rows. `token_agreement` is the share of scored tokens at which its first choice is the
    baseline's, `same_answers` that of greedy answers that are the baseline's token for token; `exact_match` and
    `score` are means over the rows that have what they need, None without any.
    """

    name: str
    error: str | None = None
    loss: float | None = None
    increase: Interval | None = None
    token_agreement: float | None = None
    same_answers: float | None = None
    exact_match: float | None = None
    score: float | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: float | None = None
    total_bytes: float | None = None
    seconds: float | None = None
    passes: bool = False


def find(
    name: str, measurement: Measurement, baseline: Measurement, rows: Sequence[Row], settings: Settings, seconds: float
) -> Finding:
    """Compare a measurement with the baseline's, which may be itself. Raises EvaluationError if the scorer fails."""
    increase = None if measurement is baseline else _increase(baseline, measurement, settings.confidence)
    answers = measurement.answers
    return Finding(
        name=name,
        loss=measurement.loss,
        increase=increase,
        token_agreement=_token_agreement(baseline, measurement),
        same_answers=_mean(_same_answers(baseline, measurement)),
        exact_match=_mean(exact_matches(rows, answers)),
        score=_mean(scores(settings.scorer, rows, answers)) if settings.scorer else None,
        weight_bytes=measurement.weight_bytes,
        kv_bytes_per_token=measurement.kv_bytes_per_token,
        total_bytes=measurement.weight_bytes + measurement.kv_bytes_per_token * baseline.max_model_len,
        seconds=seconds,
        passes=increase is not None and increase.high < settings.bound,
    )


def _increase(baseline: Measurement, candidate: Measurement, confidence: float) -> Interval | None:
    pairs = [
        (before.nats, after.nats)
        for example, before, after in zip(baseline.examples, baseline.likelihoods, candidate.likelihoods, strict=True)
        if example.num_scored
    ]
    return relative_increase(pairs, confidence) if len(pairs) >= MIN_ROWS else None


def _token_agreement(baseline: Measurement, candidate: Measurement) -> float:
    pairs = zip(baseline.likelihoods, candidate.likelihoods, strict=True)
    same = sum(ours == theirs for before, after in pairs for ours, theirs in zip(before.best, after.best, strict=True))
    return same / baseline.num_scored


def _same_answers(baseline: Measurement, candidate: Measurement) -> list[float | None]:
    return [
        None if before is None or after is None else float(before.token_ids == after.token_ids)
        for before, after in zip(baseline.answers, candidate.answers, strict=True)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
