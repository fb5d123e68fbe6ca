from __future__ import annotations

from pathlib import Path

import pytest

from engines.errors import EvaluationError
from engines.precision.data import Row, read_rows
from engines.types import ChatMessage
from tests.engines.precision.tiny import write_rows


def read(tmp_path: Path, *lines: str, limit: int | None = None) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_rows(path, limit)


def test_the_three_kinds(tmp_path: Path) -> None:
    text, prompt, chat = read(
        tmp_path,
        '{"text": "naïve"}',
        '{"prompt": "2+2=", "reference": "4", "topic": "sums"}',
        '{"messages": [{"role": "user", "content": "Hi"}], "reference": "Hello!", "answer": "Hello"}',
    )
    assert (text.line, text.text, text.prompt, text.messages, text.expected) == (1, "naïve", None, None, None)
    assert (prompt.prompt, prompt.reference, prompt.expected) == ("2+2=", "4", "4")
    assert prompt.fields["topic"] == "sums"
    assert chat.messages == (ChatMessage("user", "Hi"),)
    assert (chat.reference, chat.expected) == ("Hello!", "Hello")


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    assert [row.line for row in read(tmp_path, "", '{"text": "a"}', "  ", '{"text": "b"}')] == [2, 4]


def test_the_limit_ends_the_reading(tmp_path: Path) -> None:
    assert [row.text for row in read(tmp_path, '{"text": "a"}', '{"text": "b"}', "not JSON", limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "this is not JSON"),
        ("[]", "a row is a JSON object"),
        ("{}", "one of text, prompt and messages, and this has none"),
        ('{"text": "a", "prompt": "b"}', "and this has text and prompt"),
        ('{"text": ""}', "text is to be a string that is not empty"),
        ('{"prompt": 3}', "prompt is to be a string"),
        ('{"prompt": "a", "reference": null}', "reference is to be a string"),
        ('{"prompt": "a", "answer": 4}', "answer is to be a string"),
        ('{"text": "a", "reference": "b"}', "takes no reference"),
        ('{"text": "a", "answer": "b"}', "takes no answer"),
        ('{"messages": []}', "a list of objects, at least one"),
        ('{"messages": ["a"]}', "a list of objects"),
        ('{"messages": [{"role": "user"}]}', "a role and a content"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "both strings"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "nothing else"),
    ],
)
def test_malformed_rows_are_refused_by_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(EvaluationError, match="line 2: ") as caught:
        read(tmp_path, '{"text": "fine"}', line)
    assert words in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(EvaluationError, match="has no rows"):
        read_rows(write_rows(tmp_path / "empty.jsonl", []))
