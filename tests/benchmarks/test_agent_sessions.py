"""Sessions cut to a context keep what matters: growing prefixes, and a beginning that all share."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.agent_sessions import Cut, read_sessions

TURNS = [
    {"role": "system", "content": "policy " * 50},
    {"role": "user", "content": "please"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
    {"role": "tool", "content": "found " * 50},
    {"role": "assistant", "content": "done"},
]
CUT = Cut(context=200, system=40, message=30, output=5)


def _encode(text: str) -> list[int]:
    return list(text.encode())


def _write(path: Path, *sessions: list[dict[str, object]]) -> Path:
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in sessions)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_each_turn_of_the_assistant_is_a_call_on_all_before_it(name: str, tmp_path: Path) -> None:
    ((first, second),) = read_sessions(_write(tmp_path / name, TURNS), _encode, CUT)
    assert len(first.prompt) == 40 + len("user:\nplease\n")
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert len(second.prompt) == len(first.prompt) + 30 + 30
    assert (first.output_tokens, second.output_tokens) == (5, 5)
    assert b"look" in bytes(second.prompt), "tool calls are part of what was said"


def test_sessions_share_their_beginning(tmp_path: Path) -> None:
    other = [TURNS[0], {"role": "user", "content": "else"}, *TURNS[2:]]
    one, two = read_sessions(_write(tmp_path / "s.jsonl", TURNS, other), _encode, CUT)
    assert one[0].prompt[:40] == two[0].prompt[:40]
    assert one[0].prompt != two[0].prompt


def test_a_session_ends_where_the_context_does(tmp_path: Path) -> None:
    ((only,),) = read_sessions(_write(tmp_path / "s.jsonl", TURNS), _encode, Cut(100, 40, 30, 5))
    assert len(only.prompt) + only.output_tokens <= 100
    assert read_sessions(_write(tmp_path / "t.jsonl", TURNS), _encode, Cut(20, 40, 30, 5)) == []


@pytest.mark.parametrize("text", ["[]", '{"turns": []}', "{", '{"messages": [1]}'])
def test_what_is_no_session_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"s\.jsonl"):
        read_sessions(path, _encode, CUT)
