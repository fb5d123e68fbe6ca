from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from engines.errors import EvaluationError
from engines.precision.answers import Answer
from engines.precision.data import Row, _row
from engines.precision.scorer import exact_matches, load_scorer, scores


def rows(*expected: str | None) -> list[Row]:
    return [
        _row(line, json.dumps({"prompt": "q"} | ({"answer": answer} if answer else {})))
        for line, answer in enumerate(expected, 1)
    ]


def answers(*texts: str | None) -> list[Answer | None]:
    return [None if text is None else Answer(text, ()) for text in texts]


def length(row: Mapping[str, Any], answer: str) -> int:
    """What a user's module would hold."""
    return len(answer) + len(row["prompt"])


def test_exact_match_ignores_spaces_around() -> None:
    found = exact_matches(rows("4", "four", "4", None), answers(" 4\n", "Four", None, "4"))
    assert found == [1.0, 0.0, None, None]


def test_a_users_function_sees_the_row_and_the_answer() -> None:
    assert scores(load_scorer(f"{__name__}:length"), rows(None, None), answers("abc", None)) == [4.0, None]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("length", "module:function"),
        (":length", "module:function"),
        ("no.such.module:f", "ModuleNotFoundError"),
        (f"{__name__}:absent", "AttributeError"),
        (f"{__name__}:__name__", "no function"),
    ],
)
def test_scorers_that_are_none(name: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        load_scorer(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, "many", None])
def test_what_is_no_number_is_refused_by_line(value: object) -> None:
    with pytest.raises(EvaluationError, match="line 2"):
        scores(lambda row, answer: value if answer == "b" else 0.0, rows(None, None), answers("a", "b"))  # type: ignore[arg-type,return-value]
