"""OpenAI's request schema, read from the official client's types: each field has its effect or is refused by name."""

import json
import typing

import httpx
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)

from engines.types import GenerateRequest, SpeculationParams, TokenPrompt
from gateway.errors import BadRequestError
from gateway.openai import ChatCompletionRequest, CompletionRequest, Message, Speculation, parse
from tests.gateway.fakes import ScriptedEngine, chat, client, completion, text

# For every field of the schema: a value, and what it must do. A callable looks at the engine's request; "body" means
# that the answer shows it (tested in test_http.py); None means 400 naming the field.
Effect = typing.Callable[[GenerateRequest], bool] | str | None
CHAT_FIELDS: dict[str, tuple[object, Effect]] = {
    "messages": ([{"role": "user", "content": "x"}], lambda r: len(r.prompt.token_ids) == 19),
    "model": ("echo", "body"),
    "audio": ({"format": "mp3", "voice": "ash"}, None),
    "frequency_penalty": (0.5, lambda r: r.sampling.frequency_penalty == 0.5),
    "function_call": ("auto", None),
    "functions": ([{"name": "f"}], None),
    "logit_bias": ({"5": -1}, lambda r: r.sampling.logit_bias == {5: -1.0}),
    "logprobs": (True, lambda r: r.sampling.logprobs == 0),
    "max_completion_tokens": (3, lambda r: r.sampling.max_tokens == 3),
    "max_tokens": (4, lambda r: r.sampling.max_tokens == 4),
    "metadata": ({"a": "b"}, "body"),
    "modalities": (["audio"], None),
    "moderation": ({"model": "m"}, None),
    "n": (2, lambda r: r.n == 2),
    "parallel_tool_calls": (False, None),
    "prediction": ({"type": "content", "content": "x"}, lambda r: r.prediction == TokenPrompt((120,))),
    "presence_penalty": (-0.5, lambda r: r.sampling.presence_penalty == -0.5),
    "prompt_cache_key": ("k", lambda r: r.session == "k"),
    "prompt_cache_options": ({"mode": "explicit"}, None),
    "prompt_cache_retention": ("24h", None),
    "reasoning_effort": ("low", None),
    "response_format": ({"type": "json_object"}, None),
    "safety_identifier": ("me", lambda r: r.user == "me"),
    "seed": (7, lambda r: r.sampling.seed == 7),
    "service_tier": ("flex", None),
    "stop": (["a", "b"], lambda r: r.sampling.stop == ("a", "b")),
    "store": (True, None),
    "stream_options": ({"include_obfuscation": True}, None),
    "temperature": (0.25, lambda r: r.sampling.temperature == 0.25),
    "tool_choice": ("required", None),
    "tools": ([{"type": "function", "function": {"name": "f"}}], None),
    "top_logprobs": (3, None),  # without logprobs
    "top_p": (0.5, lambda r: r.sampling.top_p == 0.5),
    "user": ("me", lambda r: r.user == "me"),
    "verbosity": ("low", None),
    "web_search_options": ({}, None),
    "stream": (True, "body"),
}
TEXT_FIELDS: dict[str, tuple[object, Effect]] = {
    "model": ("echo", "body"),
    "prompt": ("x", lambda r: r.prompt.token_ids == (120,)),
    "best_of": (3, None),
    "echo": (True, "body"),
    "logprobs": (2, lambda r: r.sampling.logprobs == 2),
    "suffix": ("x", None),
    **{
        name: CHAT_FIELDS[name]
        for name in (
            "frequency_penalty",
            "logit_bias",
            "max_tokens",
            "n",
            "presence_penalty",
            "seed",
            "stop",
            "stream_options",
            "temperature",
            "top_p",
            "user",
            "stream",
        )
    },
}
EXTENSIONS: dict[str, tuple[object, typing.Callable[[GenerateRequest], bool]]] = {
    "top_k": (5, lambda r: r.sampling.top_k == 5),
    "min_p": (0.1, lambda r: r.sampling.min_p == 0.1),
    "repetition_penalty": (1.5, lambda r: r.sampling.repetition_penalty == 1.5),
    "stop_token_ids": ([3], lambda r: r.sampling.stop_token_ids == (3,)),
    "ignore_eos": (True, lambda r: r.sampling.ignore_eos),
    "min_tokens": (2, lambda r: r.sampling.min_tokens == 2),
    "priority": (-1, lambda r: r.priority == -1),
    "cache_salt": ("tenant", lambda r: r.cache_salt == "tenant"),
    "prediction": CHAT_FIELDS["prediction"],
    "speculation": (
        {"drafter": "ngram", "max_draft_tokens": 3, "provenance": True},
        lambda r: r.speculation == SpeculationParams(drafter="ngram", max_draft_tokens=3, provenance=True),
    ),
}


def _schema(module: object) -> set[str]:
    return set(typing.get_type_hints(module.CompletionCreateParamsStreaming))


@pytest.mark.parametrize(("module", "known"), [(chat_params, CHAT_FIELDS), (text_params, TEXT_FIELDS)])
def test_every_field_of_the_schema_is_decided(module: object, known: dict[str, object]) -> None:
    assert _schema(module) == set(known)


async def _ask(path: str, body: dict[str, object]) -> tuple[httpx.Response, ScriptedEngine]:
    engine = ScriptedEngine(*text("a"))
    async with client(engine) as http:
        return await http.post(path, json=body), engine


def _cases(fields: dict[str, tuple[object, Effect]]) -> list[object]:
    return [pytest.param(name, value, effect, id=name) for name, (value, effect) in fields.items()]


@pytest.mark.parametrize(("name", "value", "effect"), _cases(CHAT_FIELDS))
async def test_chat_fields_have_their_effect_or_are_refused(name: str, value: object, effect: Effect) -> None:
    body = chat() | {name: value}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    if name == "stream_options":
        body["stream"] = True
    _judge(name, effect, *await _ask("/v1/chat/completions", body))


@pytest.mark.parametrize(("name", "value", "effect"), _cases(TEXT_FIELDS))
async def test_text_fields_have_their_effect_or_are_refused(name: str, value: object, effect: Effect) -> None:
    stream = {"stream": True} if name == "stream_options" else {}
    _judge(name, effect, *await _ask("/v1/completions", completion() | {name: value} | stream))


@pytest.mark.parametrize(("name", "value", "effect"), _cases(EXTENSIONS))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_extensions_have_their_effect(path: str, name: str, value: object, effect: Effect) -> None:
    body = chat() if "chat" in path else completion()
    _judge(name, effect, *await _ask(path, body | {name: value}))


def _judge(name: str, effect: Effect, answer: httpx.Response, engine: ScriptedEngine) -> None:
    if effect is None:
        assert answer.status_code == 400
        param = answer.json()["error"]["param"]
        assert param.split(".")[0].split("[")[0] == name
    else:
        assert answer.status_code == 200, answer.text
        assert effect == "body" or effect(engine.requests[0])


def test_values_that_ask_for_nothing_are_served() -> None:
    neutral = {
        "audio": None,
        "function_call": "none",
        "functions": [],
        "logit_bias": {},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "prompt_cache_retention": "in_memory",
        "reasoning_effort": "none",
        "response_format": {"type": "text"},
        "store": False,
        "tool_choice": "none",
        "tools": [],
        "verbosity": "medium",
        "best_of": None,
    }
    neutral |= dict.fromkeys(set(CHAT_FIELDS) - set(neutral) - {"messages", "model"})
    del neutral["best_of"]
    parse(ChatCompletionRequest, json.dumps(chat() | neutral).encode())
    nulls = dict.fromkeys(set(TEXT_FIELDS) - {"prompt", "model"})
    parse(CompletionRequest, json.dumps(completion() | nulls | {"suffix": "", "best_of": 1}).encode())


@pytest.mark.parametrize(
    "params", [ChatCompletionSystemMessageParam, ChatCompletionUserMessageParam, ChatCompletionAssistantMessageParam]
)
def test_every_field_of_a_message_is_declared(params: type) -> None:
    assert set(typing.get_type_hints(params)) <= set(Message.model_fields)


@pytest.mark.parametrize("field", ["tool_calls", "tool_call_id", "function_call", "refusal", "audio"])
def test_message_fields_without_effect_are_refused(field: str) -> None:
    body = chat(messages=[{"role": "assistant", "content": "x", field: ["y"]}])
    with pytest.raises(BadRequestError, match="not supported") as caught:
        parse(ChatCompletionRequest, json.dumps(body).encode())
    assert caught.value.param == f"messages[0].{field}"


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "user", "content": parts}])
    assert parse(ChatCompletionRequest, json.dumps(body).encode()).messages[0].text == "a\nb"


def test_parts_of_a_prediction_are_one_text() -> None:
    parts = [{"type": "text", "text": "def f():\n"}, {"type": "text", "text": "    pass"}]
    body = chat(prediction={"type": "content", "content": parts})
    assert parse(ChatCompletionRequest, json.dumps(body).encode()).predicted_text == "def f():\n    pass"


@pytest.mark.parametrize("speculation", [None, {}, {"drafter": None, "max_draft_tokens": None, "provenance": None}])
def test_nothing_asked_of_speculation_is_its_defaults(speculation: object) -> None:
    request = parse(CompletionRequest, json.dumps(completion(speculation=speculation)).encode())
    assert request.drafting() == SpeculationParams()


def test_every_parameter_of_speculation_can_be_asked_for() -> None:
    assert set(Speculation.model_fields) == set(SpeculationParams.model_fields)


def test_true_is_not_one() -> None:
    # Python's 1 == True must not let a number pass for a neutral boolean.
    with pytest.raises(BadRequestError, match="parallel_tool_calls"):
        parse(ChatCompletionRequest, json.dumps(chat(parallel_tool_calls=1)).encode())


def test_equal_names_for_the_same_limit_may_agree() -> None:
    request = parse(ChatCompletionRequest, json.dumps(chat(max_completion_tokens=8)).encode())
    assert request.wanted_tokens() == 8
