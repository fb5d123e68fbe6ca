"""How good an answer is, as a number: exact match, or a function of the user's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.errors import EvaluationError
from engines.precision.answers import Answer
from engines.precision.data import Row

# (the row's JSON object, the model's greedy answer) -> a finite number, more is better
Scorer = Callable[[Mapping[str, Any], str], float]


def load_scorer(name: str) -> Scorer:
    """The function that "module:function" names. Raises EvaluationError if there is none."""
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise EvaluationError(f"A scorer is written module:function, not {name!r}.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's own module may raise anything
        raise EvaluationError(f"The scorer {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise EvaluationError(f"The scorer {name!r} is no function.")
    scorer: Scorer = function
    return scorer


def exact_matches(rows: Sequence[Row], answers: Sequence[Answer | None]) -> list[float | None]:
    """1.0 where an answer, without spaces around it, is the row's expected one, else 0.0; None where none is known."""
    return [
        None if answer is None or row.expected is None else float(answer.text.strip() == row.expected.strip())
        for row, answer in zip(rows, answers, strict=True)
    ]


def scores(scorer: Scorer, rows: Sequence[Row], answers: Sequence[Answer | None]) -> list[float | None]:
    """What the scorer says of each answer; None where there is no answer. Raises EvaluationError naming the line."""
    return [
        None if answer is None else _score(scorer, row, answer.text) for row, answer in zip(rows, answers, strict=True)
    ]


def _score(scorer: Scorer, row: Row, answer: str) -> float:
    try:
        score = float(scorer(row.fields, answer))
    except Exception as error:  # as above
        raise EvaluationError(f"The scorer failed on line {row.line}: {type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise EvaluationError(f"The scorer says {score} of line {row.line}; a score is a finite number.")
    return score
