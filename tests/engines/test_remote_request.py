from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from engines.errors import UnsupportedParameterError
from engines.remote_request import request_body
from engines.types import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    Prompt,
    SamplingParams,
    SpeculationParams,
    TextPrompt,
    TokenPrompt,
)

ALWAYS = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
CHAT = ChatPrompt((ChatMessage("user", "u"),))


def request(prompt: Prompt | None = None, n: int = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", prompt or TextPrompt("hi"), SamplingParams(max_tokens=5, **sampling), n=n)


def body(request: GenerateRequest) -> dict[str, object]:
    return request_body(request, "m", accepts_token_ids=True)[1]


def refused_param(request: GenerateRequest) -> str | None:
    with pytest.raises(UnsupportedParameterError) as refused:
        body(request)
    return refused.value.param


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
    full = GenerateRequest("r", TextPrompt("hi"), SamplingParams(max_tokens=5), 2, -1, "tenant", "ann", session="s")
    extras = {"n": 2, "priority": -1, "cache_salt": "tenant", "user": "ann", "prompt_cache_key": "s"}
    assert body(full) == ALWAYS | {"prompt": "hi"} | extras


def test_a_prediction_goes_with_a_chat_as_openais_field() -> None:
    sent = body(replace(request(CHAT), prediction=TextPrompt("as before")))
    messages = [{"role": "user", "content": "u"}]
    assert sent == ALWAYS | {"messages": messages, "prediction": {"type": "content", "content": "as before"}}


@pytest.mark.parametrize(
    ("prompt", "prediction"),
    [
        (TextPrompt("hi"), TextPrompt("as before")),
        (TokenPrompt((1,)), TokenPrompt((2,))),
        (TokenPrompt((1,)), TextPrompt("as before")),
        (CHAT, TokenPrompt((2,))),
    ],
)
def test_a_prediction_that_no_server_takes_is_refused(prompt: Prompt, prediction: TextPrompt | TokenPrompt) -> None:
    assert refused_param(replace(request(prompt), prediction=prediction)) == "prediction"


@pytest.mark.parametrize("prompt", [CHAT, TextPrompt("hi"), TokenPrompt((1,))])
@pytest.mark.parametrize(
    ("name", "value"),
    [("drafter", "none"), ("drafter", "ngram"), ("max_draft_tokens", 0), ("max_draft_tokens", 4), ("provenance", True)],
)
def test_what_cannot_be_asked_of_a_servers_drafting_is_refused_by_name(prompt: Prompt, name: str, value: Any) -> None:
    speculation = SpeculationParams(**{name: value})
    assert refused_param(replace(request(prompt), speculation=speculation)) == f"speculation.{name}"


def test_spelled_out_defaults_of_speculation_ask_for_nothing() -> None:
    plain = SpeculationParams(drafter="auto", max_draft_tokens=None, provenance=False)
    assert body(replace(request(), speculation=plain)) == ALWAYS | {"prompt": "hi"}
