from __future__ import annotations

import json
from typing import Any

import pytest

from engines.errors import (
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    RemoteServerError,
    UnsupportedParameterError,
)
from engines.remote_wire import ChunkReader, request_body
from engines.types import (
    ChatMessage,
    ChatPrompt,
    Delta,
    GenerateRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    TopLogprob,
    Usage,
)

ALWAYS = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}


def request(prompt: Prompt | None = None, n: int = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", prompt or TextPrompt("hi"), SamplingParams(max_tokens=5, **sampling), n=n)


def body(request: GenerateRequest) -> dict[str, object]:
    return request_body(request, "m", accepts_token_ids=True)[1]


def read_all(chunks: list[dict[str, Any]], n: int = 1, logprobs: int | None = None) -> list[Delta]:
    reader = ChunkReader(request(n=n, logprobs=logprobs))
    deltas = [delta for chunk in chunks for delta in reader.read(json.dumps(chunk))]
    return deltas + list(reader.finish())


def text_chunk(text: str = "", index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text} | more]}


USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}


def test_text_goes_to_completions_with_nothing_but_what_is_needed() -> None:
    assert request_body(request(), "m", accepts_token_ids=False) == ("completions", ALWAYS | {"prompt": "hi"})


def test_token_ids_go_to_completions_where_they_are_accepted() -> None:
    tokens = request(TokenPrompt((1, 2)))
    assert request_body(tokens, "m", accepts_token_ids=True) == ("completions", ALWAYS | {"prompt": [1, 2]})
    with pytest.raises(UnsupportedParameterError) as refused:
        request_body(tokens, "m", accepts_token_ids=False)
    assert refused.value.param == "prompt"


def test_chat_goes_to_chat_completions() -> None:
    chat = ChatPrompt((ChatMessage("system", "s"), ChatMessage("user", "u", name="ann")))
    path, sent = request_body(request(chat, logprobs=2), "m", accepts_token_ids=False)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "ann"}]
    assert (path, sent) == ("chat/completions", ALWAYS | {"messages": messages, "logprobs": True, "top_logprobs": 2})


def test_every_sampling_parameter_that_is_set_is_sent() -> None:
    values: dict[str, Any] = {
        **{"temperature": 0.0, "top_p": 0.5, "presence_penalty": 1.0, "frequency_penalty": -1.0, "seed": 0},
        **{"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True},
        **{"stop": ("a", "b"), "stop_token_ids": (7,), "logit_bias": {4: -100.0}, "logprobs": 0},
    }
    assert set(values) == set(SamplingParams.model_fields) - {"max_tokens"}
    sent = body(request(**values))
    lists = {"stop": ["a", "b"], "stop_token_ids": [7], "logit_bias": {"4": -100.0}}
    assert sent == ALWAYS | {"prompt": "hi"} | values | lists
    json.dumps(sent)


def test_every_field_of_the_request_is_sent() -> None:
    full = GenerateRequest("r", TextPrompt("hi"), SamplingParams(max_tokens=5), 2, -1, "tenant", "ann")
    assert body(full) == ALWAYS | {"prompt": "hi", "n": 2, "priority": -1, "cache_salt": "tenant", "user": "ann"}


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
