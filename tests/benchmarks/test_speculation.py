"""What the figures of benchmarks.speculation are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.speculation import FULL, QUICK, _batches, _named, _row, claims
from benchmarks.speculation_picture import draw
from benchmarks.speculation_systems import Measured
from benchmarks.turns import Job
from benchmarks.workloads import Prompt

PROMPTS = tuple(Prompt((i,)) for i in range(32))


def row(
    drafter: str, length: int | str, *speeds: float, system: str = "outrider", sequences: int = 1
) -> dict[str, Any]:
    group = {"workload": "code", "temperature": 0.0, "sequences": sequences}
    passes = {str(number): speed for number, speed in enumerate(speeds)}
    figures = {"tokens_per_s": speeds[0], "tokens_per_s_by_pass": passes}
    return {"system": system, **group, "drafter": drafter, "draft_length": length, **figures}


ROWS = [
    row("none", 0, 10.0),
    row("ngram", 1, 11.0),
    row("ngram", 2, 12.0),
    row("ngram", "adaptive", 13.2),
    row("model", 1, 20.0),
    row("model", "adaptive", 19.0),
    row("none", 0, 9.0, system="transformers"),
    row("model", "adaptive", 15.0, system="transformers_assisted"),
    row("model", 3, 12.5, system="llama.cpp_speculative"),
    row("model", 8, 10.0, system="llama.cpp_speculative"),
    row("none", 0, 100.0, sequences=16),
    row("ngram", "adaptive", 97.0, sequences=16),
]


def test_claims_compare_with_plain_the_best_fixed_length_and_the_best_peer() -> None:
    found = {(claim["sequences"], claim["drafter"]): claim for claim in claims(ROWS)}
    assert set(found) == {(1, "ngram"), (1, "model"), (16, "ngram")}
    ngram, model, many = found[1, "ngram"], found[1, "model"], found[16, "ngram"]
    assert (ngram["adaptive_over_plain"], ngram["adaptive_over_best_fixed"]) == (1.32, 1.1)
    assert ngram["adaptive_over_best_peer"] == 0.88
    assert (model["adaptive_over_best_fixed"], model["adaptive_over_best_peer"]) == (0.95, 1.267)
    assert model["adaptive_over_peers"] == {
        "transformers": 2.111,
        "transformers_assisted": 1.267,
        "llama.cpp_speculative": 1.52,
    }
    assert (many["adaptive_over_peers"], many["adaptive_over_best_peer"]) == ({}, None)
    assert (many["adaptive_over_plain"], many["adaptive_over_best_fixed"]) == (0.97, None)


def test_what_is_compared_ran_in_the_same_passes() -> None:
    """The machine halves its speed after each pass; a length that ran once was lucky, and is out."""
    rows = [
        row("none", 0, 10.0, 5.0, 2.5),
        row("model", 1, 40.0),
        row("model", 2, 20.0, 11.0, 5.0),
        row("model", 3, 20.0, 10.0, 6.0),
        row("model", "adaptive", 20.0, 10.0, 5.0),
    ]
    (claim,) = claims(rows)
    assert claim["adaptive_over_plain"] == 2.0
    assert claim["adaptive_over_best_fixed"] == 1.0


def test_a_row_adds_up_batches_and_takes_the_median_of_passes() -> None:
    def run(seconds: float) -> list[Measured]:
        return [Measured(30, 10, 2, seconds / 2, 20, 10), Measured(30, 10, 2, seconds / 2, 20, 10)]

    job = Job("outrider", "model", 4, lambda batch: run(1.0)[0])
    figures = _row(job, {"workload": "code"}, {0: run(3.0), 1: run(1.0), 3: run(2.0)})
    assert figures["tokens_per_s"] == 30.0
    assert figures["tokens_per_s_by_pass"] == {"0": 20.0, "1": 60.0, "3": 30.0}
    assert (figures["tokens_per_step"], figures["acceptance_rate"]) == (1.5, 0.5)


def test_one_sequence_is_measured_on_several_prompts() -> None:
    assert [len(batch) for batch in _batches(PROMPTS, 1)] == [1] * 8
    assert [len(batch) for batch in _batches(PROMPTS, 32)] == [32]


def test_the_quick_plan_is_part_of_the_full_one() -> None:
    assert set(QUICK.groups()) < set(FULL.groups())
    assert {setting.length for setting in FULL.settings("code", 0.0)} == {0, 1, 2, 3, 4, 5, 6, 7, 8, "adaptive"}
    assert "prediction" in {setting.drafter for setting in FULL.settings("edit", 0.0)}
    assert "prediction" not in {setting.drafter for setting in FULL.settings("chat", 0.0)}


def test_a_misspelt_name_is_refused() -> None:
    assert _named("auto,ngram", ("ngram", "model", "auto")) == ["ngram", "auto"]
    with pytest.raises(typer.BadParameter, match="nrgam"):
        _named("nrgam", ("ngram", "model"))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "speculation.png")
    assert (tmp_path / "speculation.png").read_bytes().startswith(b"\x89PNG")
