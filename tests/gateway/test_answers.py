"""Draft tokens in the usage, and who found which token in both endpoints' answers, whole and streamed."""

import json
from dataclasses import replace

import pytest

from engines.types import Delta, Piece, Usage
from gateway.answers import usage_body
from tests.gateway.fakes import LAST, ScriptedEngine, chat, client, completion, events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"speculation": {"provenance": True}}
# "Hel" is drafted, "lo" the target's own, two tokens make one character, and the stop token has no text.
PIECES = [
    (Piece("Hel", "ngram"), Piece("lo", "target")),
    (Piece("", "model"),),
    (Piece("é", "suffix"),),
]
SCRIPT = [
    *((Delta(0, "".join(piece.text for piece in pieces), (1,) * len(pieces), provenance=pieces),) for pieces in PIECES),
    (replace(LAST, token_ids=(2,), provenance=(Piece("", "target"),)),),
]
TOLD = [
    {"text": "Hel", "source": "ngram"},
    {"text": "lo", "source": "target"},
    {"text": "", "source": "model"},
    {"text": "é", "source": "suffix"},
    {"text": "", "source": "target"},
]


def _body(path: str, **fields: object) -> dict[str, object]:
    return (chat if path == CHAT else completion)(**fields)


def _text(choice: dict[str, dict[str, str]]) -> str:
    inner = choice.get("delta") or choice.get("message") or {}
    return str(inner.get("content") or choice.get("text") or "")


async def _streamed(path: str, engine: ScriptedEngine | None = None, **fields: object) -> list[dict[str, object]]:
    async with client(engine) as http:
        answer = await http.post(path, json=_body(path, stream=True, **fields))
    assert answer.status_code == 200, answer.text
    return [choice for event in events(answer.text)[:-1] for choice in json.loads(event)["choices"]]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_tells_who_found_each_token(path: str) -> None:
    choices = await _streamed(path, ScriptedEngine(*SCRIPT), **ASKED)
    assert [piece for choice in choices for piece in choice["provenance"]] == TOLD
    for choice in choices:
        assert "".join(piece["text"] for piece in choice["provenance"]) == _text(choice)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_whole_answer_tells_who_found_each_token(path: str) -> None:
    async with client(ScriptedEngine(*SCRIPT)) as http:
        (choice,) = (await http.post(path, json=_body(path, **ASKED))).json()["choices"]
    assert choice["provenance"] == TOLD
    assert _text(choice) == "Helloé"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_who_does_not_ask_is_not_told(path: str) -> None:
    engine = ScriptedEngine((replace(LAST, text="a"),))
    async with client(engine) as http:
        (choice,) = (await http.post(path, json=_body(path))).json()["choices"]
    assert not engine.requests[0].speculation.provenance
    assert "provenance" not in choice
    assert all("provenance" not in choice for choice in await _streamed(path, engine))


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stop", ["zz", "ser", "c"])
async def test_provenance_adds_up_to_the_text_whatever_stops_it(path: str, stop: str) -> None:
    # "zz" is never found, but holds nothing back for good; the others cut the text inside a token's.
    choices = await _streamed(path, stop=[stop], max_tokens=8, n=2, **ASKED)
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        told = [piece for choice in own for piece in choice["provenance"]]
        assert {piece["source"] for piece in told} == {"target"}
        assert "".join(piece["text"] for piece in told) == "".join(map(_text, own))
        full = "user: hi" if path == CHAT else "abcabcab"
        assert "".join(map(_text, own)) == full.split(stop)[0]
        assert len(told) == (len(full) if stop not in full else full.index(stop) + len(stop))


async def test_an_echoed_prompt_is_the_prompts() -> None:
    async with client() as http:
        body = completion(prompt="ab", echo=True, max_tokens=1, **ASKED)
        (choice,) = (await http.post(TEXT, json=body)).json()["choices"]
    assert choice["text"] == "aba"
    assert choice["provenance"] == [{"text": "ab", "source": "prompt"}, {"text": "a", "source": "target"}]
    streamed = await _streamed(TEXT, prompt="ab", echo=True, max_tokens=2, **ASKED)
    for choice in streamed:
        assert "".join(piece["text"] for piece in choice["provenance"]) == choice["text"]
    assert [piece["source"] for choice in streamed for piece in choice["provenance"]] == ["prompt", "target", "target"]


def test_draft_tokens_are_summed_over_choices() -> None:
    usages = [Usage(5, 7, 2, 3, 1), Usage(5, 8, 2, 4, 0), Usage(6, 1)]
    body = usage_body([*usages[:2], *[usages[2]] * 2], n=2)
    assert (body["prompt_tokens"], body["completion_tokens"]) == (11, 17)
    assert body["completion_tokens_details"] == {"accepted_prediction_tokens": 7, "rejected_prediction_tokens": 1}


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_draft_tokens_are_in_every_usage(path: str) -> None:
    engine = ScriptedEngine((replace(LAST, usage=Usage(3, 9, 0, 6, 2)),))
    async with client(engine) as http:
        whole = (await http.post(path, json=_body(path))).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await http.post(path, json=_body(path, **options))
    told = {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2}
    assert whole["usage"]["completion_tokens_details"] == told
    assert json.loads(events(streamed.text)[-2])["usage"]["completion_tokens_details"] == told
