"""Decisions over HTTP: dry runs, receipts in answers and afterwards, and who may see them."""

import json
from collections.abc import AsyncGenerator

import pytest

from engines.types import Delta, GenerateRequest, Usage
from gateway.answers import JsonObject
from tests.gateway.fakes import ScriptedEngine, chat, client, completion, events, text

SALT = "x-outrider-cache-salt"


class Explaining(ScriptedEngine):
    """Places its requests, and says where."""

    policy = "warm"

    async def generate_noting(
        self, request: GenerateRequest, entry: JsonObject
    ) -> AsyncGenerator[tuple[Delta, ...], None]:
        entry["chosen"] = f"r{len(self.requests)}"
        async for item in self.generate(request):
            yield item
        entry["cached_tokens_found"] = 2

    async def explain(self, request: GenerateRequest) -> JsonObject:
        return {"chosen": "r9", "salt": request.cache_salt}


@pytest.mark.parametrize("body", [chat(cache_salt="s"), completion(cache_salt="s")])
async def test_a_dry_run_decides_and_computes_nothing(body: dict[str, object]) -> None:
    engine = Explaining(*text("a"))
    async with client(engine) as http:
        answer = await http.post("/v1/route", json=body)
    assert answer.json() == {
        "object": "route",
        "model": {"asked": "echo", "chosen": "echo", "reason": "named"},
        "replica": {"policy": "warm", "prompts": [{"chosen": "r9", "salt": "s"}]},
    }
    assert engine.requests == []


async def test_an_engine_of_one_process_has_no_replica_to_choose() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/v1/route", json=chat())
    assert answer.json()["replica"] == {"policy": "single", "prompts": []}


@pytest.mark.parametrize(
    ("body", "param"),
    [(b"{", None), (b"[]", None), (b'{"model": "echo"}', "messages"), (b'{"model": "no", "prompt": "a"}', "model")],
)
async def test_a_dry_run_is_as_strict_as_the_request(body: bytes, param: str | None) -> None:
    async with client() as http:
        answer = await http.post("/v1/route", content=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


async def test_an_answer_has_its_receipt_if_asked() -> None:
    async with client(Explaining(*text("a", "b"))) as http:
        answer = await http.post("/v1/completions", json=completion(prompt=["x", "y"], receipt=True))
        plain = await http.post("/v1/completions", json=completion())
    receipt = answer.json()["receipt"]
    assert receipt["id"] == answer.headers["x-request-id"]
    chosen = [entry["chosen"] for entry in receipt["replica"]["prompts"]]
    assert chosen == ["r0", "r1"], "in the prompts' order"
    assert receipt["usage"]["completion_tokens"] == 4
    assert "receipt" not in plain.json()


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream_ends_with_its_receipt_if_asked(include_usage: bool) -> None:
    engine = Explaining(*text("a"), (Delta(0, "", finish_reason="stop", usage=Usage(3, 2, 2, 1, 1)),))
    asked = chat(stream=True, receipt=True, stream_options={"include_usage": include_usage})
    async with client(engine) as http:
        answer = await http.post("/v1/chat/completions", json=asked)
        found = await http.get(f"/v1/receipts/{answer.headers['x-request-id']}")
    *_, last, done = events(answer.text)
    assert done == "[DONE]"
    receipt = json.loads(last)["receipt"]
    assert json.loads(last)["choices"] == []
    assert receipt["replica"]["prompts"] == [{"chosen": "r0", "cached_tokens_found": 2}]
    assert receipt["speculation"] == {"accepted_draft_tokens": 1, "rejected_draft_tokens": 1, "drafters": {}}
    assert found.json()["replica"] == receipt["replica"]


async def test_a_receipt_is_found_by_its_tenant_alone() -> None:
    async with client(Explaining(*text("a"))) as http:
        answer = await http.post("/v1/chat/completions", json=chat(cache_salt="Tenänt"))
        path = f"/v1/receipts/{answer.headers['x-request-id']}"
        mine = await http.get(path, headers={SALT: "Ten%C3%A4nt"})
        stranger = await http.get(path, headers={SALT: "other"})
        nobody = await http.get(path)
    assert mine.json()["model"]["chosen"] == "echo"
    assert stranger.status_code == nobody.status_code == 404
    assert stranger.json()["error"]["code"] == "receipt_not_found"


async def test_a_salt_that_no_request_can_have_is_refused() -> None:
    async with client() as http:
        answer = await http.get("/v1/receipts/x", headers={SALT: "a" * 513})
    assert answer.status_code == 400


async def test_a_request_that_was_refused_has_no_receipt() -> None:
    async with client() as http:
        answer = await http.post("/v1/chat/completions", json=chat(model="no"))
        found = await http.get(f"/v1/receipts/{answer.headers['x-request-id']}")
    assert found.status_code == 404
