from __future__ import annotations

import json
from typing import Any

import pytest

from engines.errors import (
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    RemoteServerError,
)
from engines.remote_wire import ChunkReader
from engines.types import (
    Delta,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TopLogprob,
    Usage,
)


def request(n: int = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", TextPrompt("hi"), SamplingParams(max_tokens=5, **sampling), n=n)


def read_all(chunks: list[dict[str, Any]], n: int = 1, logprobs: int | None = None) -> list[Delta]:
    reader = ChunkReader(request(n=n, logprobs=logprobs))
    deltas = [delta for chunk in chunks for delta in reader.read(json.dumps(chunk))]
    return deltas + list(reader.finish())


def text_chunk(text: str = "", index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text} | more]}


USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}


def test_usage_may_come_after_the_end_of_the_choice() -> None:
    assert read_all([text_chunk("a"), text_chunk("b", finish_reason="stop", stop_reason="\n"), USAGE]) == [
        Delta(0, "a"),
        Delta(0, "b"),
        Delta(0, finish_reason="stop", stop_reason="\n", usage=Usage(3, 7)),
    ]


def test_chat_chunks_have_their_text_in_a_delta() -> None:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": None},
        USAGE | {"usage": USAGE["usage"] | {"prompt_tokens_details": {"cached_tokens": 2}}},
    ]
    assert read_all(chunks) == [Delta(0, "a"), Delta(0, finish_reason="length", usage=Usage(3, 7, 2))]


@pytest.mark.parametrize(
    ("details", "accepted", "rejected"),
    [
        ({"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 2}, 4, 2),
        ({"accepted_prediction_tokens": 4}, 4, 0),
        ({"accepted_prediction_tokens": None, "rejected_prediction_tokens": None, "audio_tokens": 0}, 0, 0),
        (None, 0, 0),
    ],
)
def test_draft_tokens_are_read_from_the_usage(details: dict[str, Any] | None, accepted: int, rejected: int) -> None:
    usage = USAGE | {"usage": USAGE["usage"] | {"completion_tokens_details": details}}
    assert read_all([text_chunk("a", finish_reason="stop"), usage])[-1].usage == Usage(3, 7, 0, accepted, rejected)


def test_draft_tokens_of_several_choices_add_up() -> None:
    details = {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 1}
    chunks = [text_chunk("a", 0), *[text_chunk("b", 1)] * 2, text_chunk("", 0, finish_reason="stop")]
    usage = USAGE | {"usage": USAGE["usage"] | {"completion_tokens_details": details}}
    last = read_all([*chunks, text_chunk("", 1, finish_reason="stop"), usage], n=2)[-2:]
    told = [(delta.usage.accepted_draft_tokens, delta.usage.rejected_draft_tokens) for delta in last if delta.usage]
    assert [sum(column) for column in zip(*told, strict=True)] == [4, 1]
    assert told[1][0] > told[0][0]


def test_usage_of_several_choices_adds_up_in_proportion() -> None:
    chunks = [text_chunk("a", 0), text_chunk("b", 1), text_chunk("c", 1)]
    ends = [text_chunk(index=1, finish_reason="stop"), text_chunk(index=0, finish_reason="length")]
    first, second = read_all([*chunks, *ends, USAGE], n=2)[-2:]
    assert (first.index, first.finish_reason, first.usage) == (0, "length", Usage(3, 2))
    assert (second.index, second.finish_reason, second.usage) == (1, "stop", Usage(3, 5))


def test_untold_usage_is_zero() -> None:
    assert read_all([text_chunk("a", finish_reason="stop")])[-1].usage == Usage(0, 0)


@pytest.mark.parametrize(
    ("told", "meant"),
    [("stop", "stop"), ("eos_token", "stop"), ("length", "length"), ("abort", "abort"), ("content_filter", "abort")],
)
def test_finish_reasons_are_translated(told: str, meant: str) -> None:
    assert read_all([text_chunk("a", finish_reason=told)])[-1].finish_reason == meant


@pytest.mark.parametrize("told", ["tool_calls", "function_call", "error"])
def test_unasked_for_finish_reasons_are_errors(told: str) -> None:
    with pytest.raises(RemoteServerError, match=told):
        read_all([text_chunk("a", finish_reason=told)])


def test_an_unfinished_choice_is_never_a_silent_end() -> None:
    with pytest.raises(EngineDeadError):
        read_all([text_chunk("a", 0, finish_reason="stop"), text_chunk("b", 1), USAGE], n=2)


def test_completion_logprobs_are_read_best_first_and_no_more_than_asked_for() -> None:
    told = {"tokens": ["x"], "token_logprobs": [-2.0], "top_logprobs": [{"x": -2.0, "z": -1.5, "y": -0.5}]}
    (entry,) = read_all([text_chunk("x", logprobs=told, finish_reason="stop")], logprobs=2)[0].logprobs or ()
    assert (entry.token, entry.logprob, entry.token_id, entry.token_bytes) == ("x", -2.0, None, None)
    assert entry.top == (TopLogprob("y", -0.5), TopLogprob("z", -1.5))


def test_chat_logprobs_are_read_with_their_bytes() -> None:
    top = [{"token": "é", "logprob": -0.1, "bytes": [195, 169]}, {"token": "e", "logprob": -3.0, "bytes": None}]
    choice = {"index": 0, "delta": {"content": "é"}, "finish_reason": "stop"}
    chunk = {"choices": [choice | {"logprobs": {"content": [top[0] | {"top_logprobs": top}]}}]}
    (entry,) = read_all([chunk], logprobs=2)[0].logprobs or ()
    assert (entry.token, entry.token_bytes) == ("é", b"\xc3\xa9")
    assert entry.top == (TopLogprob("é", -0.1, None, b"\xc3\xa9"), TopLogprob("e", -3.0))


def test_tokens_of_a_choice_are_counted_by_its_logprobs() -> None:
    told = {"tokens": ["a", "b", "c"], "token_logprobs": [-1.0] * 3, "top_logprobs": None}
    one = {"tokens": ["d"], "token_logprobs": [-1.0], "top_logprobs": None}
    chunks = [text_chunk("abc", 0, logprobs=told, finish_reason="stop")]
    chunks += [text_chunk("d", 1, logprobs=one, finish_reason="stop")]
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 4}}
    last = read_all([*chunks, usage], n=2, logprobs=0)[-2:]
    assert [delta.usage for delta in last] == [Usage(1, 3), Usage(1, 1)]


def test_ignored_logprobs_are_an_error() -> None:
    with pytest.raises(RemoteServerError, match="log-probabilities"):
        read_all([text_chunk("a", finish_reason="stop")], logprobs=1)


@pytest.mark.parametrize(
    "data",
    [
        "no json",
        "[]",
        json.dumps({"choices": [{"index": "x"}]}),
        json.dumps(text_chunk("a", 1)),
        json.dumps(text_chunk("a", logprobs={"tokens": ["a", "b"], "token_logprobs": [-1.0]})),
    ],
)
def test_what_is_no_chunk_is_an_error(data: str) -> None:
    with pytest.raises(RemoteServerError, match="no valid chunk"):
        ChunkReader(request(logprobs=1)).read(data)


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"error": {"message": "boom", "code": 400, "param": "stop"}}, InvalidRequestError),
        ({"error": {"message": "boom", "code": "server_error"}}, RemoteServerError),
        ({"error": {"message": "boom", "http_status_code": 429}}, EngineOverloadedError),
        ({"error": "boom", "error_type": "generation"}, RemoteServerError),
        ({"object": "error", "message": "boom", "code": 503}, EngineDeadError),
    ],
)
def test_error_events_raise_what_they_say(event: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="boom"):
        ChunkReader(request()).read(json.dumps(event))
