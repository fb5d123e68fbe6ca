"""The routes in memory: whole answers, streams, models, operators' pages."""

import asyncio
import json

import httpx
import pytest

from engines.errors import EngineDeadError, EngineTimeoutError, ModelLoadError
from engines.types import Delta, TokenLogprob, TopLogprob
from tests.gateway.fakes import LAST, ScriptedEngine, chat, client, completion, config, events, text


async def _chunks(http: httpx.AsyncClient, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    answer = await http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    payloads = events(answer.text)
    assert payloads[-1] == "[DONE]"
    return [json.loads(payload) for payload in payloads[:-1]]


async def test_a_chat_is_answered() -> None:
    async with client() as http:
        answer = (await http.post("/v1/chat/completions", json=chat())).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "echo"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "user: hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt_tokens = len("user: hi\nassistant: ")
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": prompt_tokens + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }


async def test_a_chat_stream_has_openais_chunks() -> None:
    async with client(ScriptedEngine(*text("a", "b"))) as http:
        chunks = await _chunks(http, "/v1/chat/completions", chat(stream_options={"include_usage": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_without_include_usage_no_chunk_has_usage() -> None:
    async with client() as http:
        chunks = await _chunks(http, "/v1/chat/completions", chat())
    assert all("usage" not in chunk for chunk in chunks)


async def test_n_choices_have_their_indices() -> None:
    async with client() as http:
        answer = (await http.post("/v1/chat/completions", json=chat(n=3))).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["usage"]["prompt_tokens"] == len("user: hi\nassistant: ")


async def test_chat_logprobs_have_bytes_and_alternatives() -> None:
    async with client() as http:
        body = chat(logprobs=True, top_logprobs=2, max_tokens=1)
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    entry = answer["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("u", [117], 0.0)
    assert [top["token"] for top in entry["top_logprobs"]] == ["u", "v"]


async def test_impossible_logprobs_are_valid_json() -> None:
    top = TopLogprob("b", float("-inf"), 1, b"b")
    delta = Delta(0, "a", (0,), (TokenLogprob("a", -0.5, 0, None, (top,)),), finish_reason="stop", usage=LAST.usage)
    async with client(ScriptedEngine((delta,))) as http:
        answer = await http.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=1))
    entry = answer.json()["choices"][0]["logprobs"]["content"][0]
    assert entry["bytes"] is None
    assert entry["top_logprobs"][0]["logprob"] == -9999.0


async def test_a_text_completion_is_answered() -> None:
    async with client() as http:
        answer = (await http.post("/v1/completions", json=completion())).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "abca", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["aba"]), (["ab", "c"], ["aba", "ccc"]), ([97, 98], ["aba"]), ([[97], [98]], ["aaa", "bbb"])],
)
async def test_every_kind_of_prompt(prompt: object, texts: list[str]) -> None:
    async with client() as http:
        answer = (await http.post("/v1/completions", json=completion(prompt=prompt, max_tokens=3))).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


async def test_several_prompts_with_n_count_each_prompt_once() -> None:
    async with client() as http:
        body = completion(prompt=["ab", "c"], n=2, max_tokens=3)
        answer = (await http.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "aba", "ccc", "ccc"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 12)


async def test_echo_repeats_the_prompt_before_each_choice() -> None:
    async with client() as http:
        answer = (
            await http.post("/v1/completions", json=completion(prompt=["ab", "c"], echo=True, max_tokens=1))
        ).json()
        chunks = await _chunks(http, "/v1/completions", completion(prompt="ab", echo=True, max_tokens=2))
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "cc"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abab"


async def test_completion_logprobs_have_offsets_and_the_emitted_token() -> None:
    async with client() as http:
        answer = (await http.post("/v1/completions", json=completion(logprobs=0, max_tokens=3))).json()
        chunks = await _chunks(http, "/v1/completions", completion(logprobs=1, max_tokens=3))
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": 0.0}
    # Steps that were not read in time arrive merged, so the number of chunks is open.
    assert [i for chunk in chunks for i in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 2]


async def test_completions_default_to_sixteen_tokens_and_chats_to_the_context() -> None:
    async with client() as http:
        text_answer = (await http.post("/v1/completions", json={"model": "echo", "prompt": "abc"})).json()
        chat_answer = (await http.post("/v1/chat/completions", json=chat(max_tokens=None))).json()
    assert text_answer["usage"]["completion_tokens"] == 16
    assert chat_answer["usage"]["total_tokens"] == 256


async def test_stop_strings_end_the_answer() -> None:
    async with client() as http:
        answer = (await http.post("/v1/chat/completions", json=chat(stop=["r:"]))).json()
    assert answer["choices"][0]["message"]["content"] == "use"
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_metadata_and_service_tier_come_back() -> None:
    async with client() as http:
        body = chat(metadata={"run": "7"}, service_tier="auto")
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        plain = (await http.post("/v1/chat/completions", json=chat())).json()
    assert answer["metadata"] == {"run": "7"}
    assert answer["service_tier"] == "default"
    assert not {"metadata", "service_tier"} & plain.keys()


async def test_models_are_listed_in_order_with_their_configuration() -> None:
    async with client(more={"another/model": ScriptedEngine()}) as http:
        listed = (await http.get("/v1/models")).json()
        one = await http.get("/v1/models/another/model")
    assert [model["id"] for model in listed["data"]] == ["echo", "another/model"]
    assert one.json() == listed["data"][1]
    assert one.json()["config"] == one.headers["x-outrider-config"]
    assert one.json()["fingerprint"] == "f" * 64


async def test_every_answer_names_its_request_and_configuration() -> None:
    async with client() as http:
        good = await http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "mine-1"})
        bad = await http.post("/v1/chat/completions", json={})
        strange = await http.get("/nowhere", headers={"x-request-id": "with space"})
    assert good.headers["x-request-id"] == "mine-1"
    assert strange.headers["x-request-id"] not in ("", "with space")
    hashes = {answer.headers["x-outrider-config"] for answer in (good, bad, strange)}
    assert hashes == {good.json()["system_fingerprint"]}


async def test_health_is_about_the_process_and_ready_about_the_engines() -> None:
    sick, absent = ScriptedEngine(), ScriptedEngine()
    sick.health = EngineTimeoutError("It does not answer.")
    absent.start_errors = [ModelLoadError("No such folder.")]
    async with client(more={"sick": sick, "absent": absent}) as http:
        health, ready = await http.get("/health"), await http.get("/ready")
        sick.health = None
        still = await http.get("/ready")
    assert health.status_code == 200
    assert ready.status_code == 503
    assert ready.json()["models"] == {"sick": "It does not answer.", "absent": "No such folder."}
    assert still.json()["models"] == {"absent": "No such folder."}


async def test_ready_is_200_when_all_can_serve() -> None:
    async with client() as http:
        assert (await http.get("/ready")).json() == {"status": "ready"}


async def test_a_silent_engine_is_not_ready() -> None:
    class Silent(ScriptedEngine):
        async def check_health(self) -> None:
            await asyncio.Event().wait()

    async with client(Silent(), config(http={"health_timeout_s": 0.05})) as http:
        assert "0.05 seconds" in (await http.get("/ready")).json()["models"]["echo"]


async def test_metrics_count_requests_tokens_and_engine_stats() -> None:
    class Unreachable(ScriptedEngine):
        async def stats(self) -> None:  # type: ignore[override]
            raise EngineDeadError("gone")

    async with client(more={"gone": Unreachable()}) as http:
        await http.post("/v1/chat/completions", json=chat())
        await http.post("/v1/chat/completions", json=chat(n=99))
        await http.post("/v1/chat/completions", json=chat(model="none"))
        page = await http.get("/metrics")
    lines = page.text.splitlines()
    assert page.headers["content-type"].startswith("text/plain")
    assert 'outrider_requests_total{ingress="ingress",model="echo",status="200"} 1.0' in lines
    assert 'outrider_requests_total{ingress="ingress",model="echo",status="400"} 1.0' in lines
    assert 'outrider_requests_total{ingress="ingress",model="",status="404"} 1.0' in lines
    assert 'outrider_requests_in_flight{ingress="ingress",model="echo"} 0.0' in lines
    assert 'outrider_completion_tokens_total{ingress="ingress",model="echo"} 8.0' in lines
    assert 'outrider_time_to_first_token_seconds_count{ingress="ingress",model="echo"} 1.0' in lines
    assert 'outrider_engine_num_finished{model="echo"} 1.0' in lines
    assert not any('model="gone"' in line for line in lines)


async def test_the_schema_documents_the_bodies() -> None:
    async with client() as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in schema["properties"]
