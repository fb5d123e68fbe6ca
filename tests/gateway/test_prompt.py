"""Predictions as engines take them: plain tokens, or text; a hint that is cut rather than refused."""

import json
from collections.abc import Sequence

import pytest

from engines.byte_tokenizer import EOS_TOKEN, byte_tokenizer
from engines.types import ChatMessage, ChatPrompt, ModelCard, PromptKind, TextPrompt, TokenPrompt
from gateway import prompt as prompt_module
from gateway.prompt import PromptBuilder
from tests.gateway.fakes import CARD, ScriptedEngine, chat, client, completion, text

ENDPOINTS = [("/v1/chat/completions", chat), ("/v1/completions", completion)]


def _builder(*kinds: PromptKind) -> PromptBuilder:
    return PromptBuilder(frozenset(kinds), byte_tokenizer())


def _predicted(content: object) -> dict[str, object]:
    return {"type": "content", "content": content}


@pytest.mark.parametrize(
    ("kinds", "text", "expected"),
    [
        (("tokens",), "ab", TokenPrompt((97, 98))),
        (("tokens", "text"), "é", TokenPrompt(tuple("é".encode()))),
        (("text", "chat"), "ab", TextPrompt("ab")),
        (("tokens",), "", None),
        (("text",), "", None),
    ],
)
async def test_a_prediction_has_the_engines_own_kind(kinds: Sequence[PromptKind], text: str, expected: object) -> None:
    assert await _builder(*kinds).prediction(text, 64) == expected


async def test_a_prediction_has_no_special_tokens_not_even_a_tokenizers_own() -> None:
    tokenizer = byte_tokenizer()
    tokenizer._hf.backend_tokenizer.post_processor = _begins_with_eos()
    assert tokenizer.encode("ab")[0] == tokenizer._hf.eos_token_id
    builder = PromptBuilder(frozenset({"tokens"}), tokenizer)
    assert await builder.prediction(f"a{EOS_TOKEN}b", None) == TokenPrompt((97, 98))
    assert await builder.prediction(EOS_TOKEN, None) is None


def _begins_with_eos() -> object:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{EOS_TOKEN} $A", special_tokens=[(EOS_TOKEN, 256)])


@pytest.mark.parametrize("max_model_len", [None, 4, 100])
async def test_what_no_context_could_hold_is_cut_off(max_model_len: int | None) -> None:
    prediction = await _builder("tokens").prediction("x" * 200, max_model_len)
    assert isinstance(prediction, TokenPrompt)
    assert len(prediction.token_ids) == (max_model_len or 200)


async def test_only_what_may_be_needed_of_a_huge_prediction_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    seen: list[int] = []
    encode = tokenizer.encode

    def counted(text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        seen.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", counted)
    await PromptBuilder(frozenset({"tokens"}), tokenizer).prediction("x" * 2**20, 64)
    assert seen == [64 * 16]


async def test_a_long_prediction_is_tokenized_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    aside: list[int] = []
    direct = prompt_module._aside

    async def noted(num_chars: int, work: object) -> object:
        aside.append(num_chars)
        return await direct(num_chars, work)  # type: ignore[arg-type]

    monkeypatch.setattr(prompt_module, "_aside", noted)
    prediction = await _builder("tokens").prediction("x" * 20_000, None)
    assert aside == [20_000]
    assert prediction == TokenPrompt((120,) * 20_000)


@pytest.mark.parametrize(("path", "make"), ENDPOINTS)
async def test_a_huge_prediction_is_served_and_is_no_part_of_the_prompt(path: str, make: object) -> None:
    engine = ScriptedEngine(*text("a"))
    async with client(engine) as http:
        answer = await http.post(path, json=make(prediction=_predicted("y" * 2**20)))  # type: ignore[operator]
        metrics = (await http.get("/metrics")).text
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == 3
    (request,) = engine.requests
    assert request.prediction == TokenPrompt((121,) * 64)
    assert 121 not in request.prompt.token_ids  # type: ignore[union-attr]
    num_tokens = float(len(request.prompt.token_ids))  # type: ignore[union-attr]
    assert f'outrider_prompt_tokens_total{{ingress="ingress",model="echo"}} {num_tokens}' in metrics


async def test_every_prompt_and_choice_gets_the_same_prediction() -> None:
    engine = ScriptedEngine(*text("a"))
    async with client(engine) as http:
        body = completion(prompt=["a", "b"], n=2, prediction=_predicted("yes"), speculation={"drafter": "prediction"})
        answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert [(request.n, request.prediction) for request in engine.requests] == [(2, TokenPrompt(tuple(b"yes")))] * 2


async def test_an_empty_prediction_is_none() -> None:
    engine = ScriptedEngine(*text("a"))
    async with client(engine) as http:
        await http.post("/v1/chat/completions", json=chat(prediction=_predicted([{"type": "text", "text": ""}])))
    assert engine.requests[0].prediction is None


async def test_an_engine_that_takes_chats_gets_the_prediction_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: frozenset[PromptKind] = frozenset({"chat", "text"})
    engine = ScriptedEngine(*text("a"), card=ModelCard("far", kinds, CARD.fingerprint))
    async with client(engine) as http:
        await http.post("/v1/chat/completions", json=chat(prediction=_predicted("sure")))
    assert engine.requests[0].prompt == ChatPrompt((ChatMessage("user", "hi"),))
    assert engine.requests[0].prediction == TextPrompt("sure")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prediction": _predicted("x")}, "prediction"),
        ({"speculation": {"drafter": "ngram"}}, "speculation.drafter"),
        ({"prediction": _predicted("x"), "speculation": {"drafter": "prediction"}}, "speculation.drafter"),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize(("path", "make"), ENDPOINTS)
async def test_an_engine_without_drafters_says_so(path: str, make: object, fields: object, param: str) -> None:
    async with client() as http:
        answer = await http.post(path, json=make(**fields))  # type: ignore[operator]
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["code"] == "unsupported_parameter"
