"""Judging, over measurements made up for it. What measures for real is in test_measure.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from engines.errors import EvaluationError, ModelLoadError
from engines.precision.answers import Answer
from engines.precision.candidates import Candidate, candidates
from engines.precision.data import Row
from engines.precision.findings import Settings
from engines.precision.gate import Report, run_gate
from engines.precision.likelihood import Likelihood
from engines.precision.measure import Measurement, Progress
from tests.engines.precision.tiny import example

NUM_ROWS = 40
BF16, INT8, INT4 = candidates("m", ["bf16", "int8", "int4"], ["auto"])


def measurement(
    increase: float = 0.0,
    *,
    weight_bytes: int = 1000,
    num_rows: int = NUM_ROWS,
    kv_bytes: float = 1.0,
    spread: float = 0.0,
) -> Measurement:
    """Rows of 10 tokens and 20 to 24 nats; they rise by `increase`, every other row by `spread` more, the rest less."""
    factors = [1 + increase + spread * (-1) ** i for i in range(num_rows)]
    return Measurement(
        examples=[example(range(11), 1, 5)] * num_rows,
        likelihoods=[Likelihood((20 + i % 5) * factor, tuple(range(10))) for i, factor in enumerate(factors)],
        answers=[Answer("yes", (1, 2))] * num_rows,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes,
        max_model_len=100,
    )


class Fleet:
    """Measurements by candidate, handed out in the order in which they are asked for."""

    def __init__(self, made: Mapping[Candidate, Measurement | ModelLoadError]) -> None:
        self.made = dict(made)
        self.asked: list[str] = []

    def __call__(
        self, candidate: Candidate, rows: Sequence[Row], max_new_tokens: int, progress: Progress
    ) -> Measurement:
        self.asked.append(candidate.name)
        made = self.made[candidate]
        if isinstance(made, ModelLoadError):
            raise made
        return made


def gate(made: Mapping[Candidate, Measurement | ModelLoadError], **settings: object) -> Report:
    first = next(iter(made.values()))
    rows = [scored.row for scored in first.examples] if isinstance(first, Measurement) else []
    fleet = Fleet(made)
    report = run_gate(list(made), rows, Settings(**settings), lambda stage, done, total: None, fleet)  # type: ignore[arg-type]
    assert fleet.asked == [candidate.name for candidate in made]
    return report


def test_the_smallest_that_passes_is_named() -> None:
    report = gate(
        {BF16: measurement(), INT8: measurement(0.004, weight_bytes=500), INT4: measurement(0.03, weight_bytes=250)}
    )
    assert (report.recommended, report.is_lower) == ("int8", True)
    assert [finding.passes for finding in report.findings] == [False, True, False]
    assert report.findings[1].increase is not None
    assert report.findings[1].increase.estimate == pytest.approx(0.004)
    assert (report.num_rows, report.num_scored_rows, report.num_scored_tokens) == (40, 40, 400)
    assert "int8 takes 55% of the bytes of bf16" in report.reason, "600 of 1100: weights, and 100 tokens of KV"


def test_a_wider_bound_names_a_lower_one() -> None:
    made = {BF16: measurement(), INT8: measurement(0.004, weight_bytes=500), INT4: measurement(0.03, weight_bytes=250)}
    assert gate(made, bound=0.05).recommended == "int4"


def test_the_whole_interval_has_to_lie_below_the_bound() -> None:
    noisy = {BF16: measurement(), INT8: measurement(0.004, weight_bytes=500, spread=0.05)}
    report = gate(noisy)
    increase = report.findings[1].increase
    assert increase is not None
    assert increase.estimate < 0.01 < increase.high
    assert report.recommended == "bf16"
    assert "No smaller precision" in report.reason


def test_what_takes_no_fewer_bytes_is_not_named() -> None:
    assert gate({BF16: measurement(), INT8: measurement(weight_bytes=1000)}).recommended == "bf16"


def test_a_smaller_cache_counts() -> None:
    (kv_int8,) = candidates("m", ["bf16"], ["int8"])
    report = gate({BF16: measurement(kv_bytes=4.0), kv_int8: measurement(0.001, kv_bytes=2.0)})
    assert report.recommended == "bf16 + kv int8"


def test_the_better_of_two_of_a_size_is_named() -> None:
    made = {BF16: measurement(), INT8: measurement(0.005, weight_bytes=500), INT4: measurement(weight_bytes=500)}
    assert gate(made).recommended == "int4"


def test_too_few_rows_name_nothing_below_the_baseline() -> None:
    report = gate({BF16: measurement(num_rows=29), INT8: measurement(weight_bytes=500, num_rows=29)})
    assert report.recommended == "bf16"
    assert "29 rows with something to score are too few" in report.reason
    assert report.findings[1].increase is None


def test_rows_without_anything_to_score_do_not_count_as_rows() -> None:
    def with_silent(made: Measurement) -> Measurement:
        silent = example(range(5), 5, 5)
        return replace(
            made, examples=[*made.examples, silent], likelihoods=[*made.likelihoods, Likelihood(0.0, ())],
            answers=[*made.answers, None],
        )  # fmt: skip

    made = {BF16: with_silent(measurement(num_rows=29)), INT8: with_silent(measurement(num_rows=29, weight_bytes=1))}
    assert gate(made).num_scored_rows == 29
    assert gate(made).recommended == "bf16"


def test_a_candidate_that_cannot_be_loaded_is_a_finding() -> None:
    made = {BF16: measurement(), INT4: ModelLoadError("no kernel"), INT8: measurement(weight_bytes=500)}
    report = gate(made)
    assert (report.findings[1].error, report.findings[1].loss) == ("no kernel", None)
    assert report.recommended == "int8"


def test_a_candidate_that_says_nan_is_a_finding() -> None:
    broken = replace(measurement(weight_bytes=1), likelihoods=[Likelihood(math.nan, tuple(range(10)))] * NUM_ROWS)
    report = gate({BF16: measurement(), INT8: broken})
    assert report.findings[1].error == "its loss is nan"
    assert report.recommended == "bf16"


def test_without_a_baseline_there_is_no_report() -> None:
    with pytest.raises(ModelLoadError, match="gone"):
        gate({BF16: ModelLoadError("gone")})
    broken = replace(measurement(), likelihoods=[Likelihood(math.inf, tuple(range(10)))] * NUM_ROWS)
    with pytest.raises(EvaluationError, match="nothing can be compared"):
        gate({BF16: broken})


def test_nothing_to_score_is_refused() -> None:
    silent = replace(
        measurement(), examples=[example(range(5), 5, 5)] * NUM_ROWS, likelihoods=[Likelihood(0.0, ())] * NUM_ROWS
    )
    with pytest.raises(EvaluationError, match="No row has a text or a reference"):
        gate({BF16: silent})


def test_agreement_is_with_the_baseline() -> None:
    other = measurement()
    likelihoods = [replace(found, best=(99, *found.best[1:])) for found in other.likelihoods]
    answers = [Answer("no", (3,)), *other.answers[1:]]
    report = gate({BF16: measurement(), INT8: replace(other, likelihoods=likelihoods, answers=answers)})
    assert report.findings[0].token_agreement == report.findings[0].same_answers == 1.0
    assert report.findings[1].token_agreement == pytest.approx(0.9)
    assert report.findings[1].same_answers == pytest.approx(1 - 1 / NUM_ROWS)


def test_without_answers_there_is_no_match() -> None:
    silent = replace(measurement(), answers=[None] * NUM_ROWS)
    report = gate({BF16: silent, INT8: silent}, scorer=lambda row, answer: 1.0)
    assert report.findings[1].same_answers is report.findings[1].exact_match is report.findings[1].score is None


def test_scores_are_means_over_answers() -> None:
    report = gate({BF16: measurement(), INT8: measurement()}, scorer=lambda row, answer: len(answer))
    assert [finding.score for finding in report.findings] == [3.0, 3.0]
