"""Feedback, with its request's record wherever that is."""

import asyncio
import errno
import os
from pathlib import Path

import httpx
import pytest

from gateway.log_files import LogFiles
from router_models.logs import read_log
from tests.gateway.fakes import chat, client, config


def _settings(folder: Path, **fields: object) -> object:
    return config("echo", request_log={"folder": str(folder), "max_file_bytes": 600} | fields)


async def _ask(http: httpx.AsyncClient, **fields: object) -> str:
    answer = await http.post("/v1/chat/completions", json=chat(**fields))
    return str(answer.headers["x-request-id"])


async def _say(http: httpx.AsyncClient, request_id: str, **fields: object) -> httpx.Response:
    return await http.post("/v1/feedback", json={"request_id": request_id} | fields)


def _num_closed(folder: Path) -> int:
    return len(list(folder.glob("*.gz")))


async def test_feedback_finds_its_record_after_rotation_and_restart(tmp_path: Path) -> None:
    async with client(settings=_settings(tmp_path)) as http:  # type: ignore[arg-type]
        first = await _ask(http)
        async with asyncio.timeout(30):
            while not _num_closed(tmp_path):  # what comes faster than it is written lies in one file
                await _ask(http)
        later = [await _ask(http) for _ in range(10)]
        assert (await _say(http, first, score=0.25)).status_code == 200
    assert _num_closed(tmp_path) > 1
    async with client(settings=_settings(tmp_path)) as http:  # type: ignore[arg-type]
        answer = await _say(http, later[0], correct=True)
        assert answer.json() == {"object": "feedback", "request_id": later[0], "status": "stored"}
        await _say(http, later[1], re_ask=True)
        await _say(http, later[2], correct=False)
        live = read_log(tmp_path)
        assert live.results[first] == {"echo": 0.25}
        assert [live.results[i]["echo"] for i in later[:3]] == [1.0, 0.0, 0.0]
    assert read_log(tmp_path).results == live.results


async def test_nobody_speaks_for_another_tenant(tmp_path: Path) -> None:
    async with client(settings=_settings(tmp_path)) as http:  # type: ignore[arg-type]
        banks, nobodys = await _ask(http, cache_salt="bank"), await _ask(http)
        for fields in ({}, {"cache_salt": "thief"}):
            await _say(http, banks, score=0.0, **fields)
        await _say(http, nobodys, score=0.0, cache_salt="bank")
        await _say(http, banks, score=1.0, cache_salt="bank")
    log = read_log(tmp_path)
    assert log.results == {banks: {"echo": 1.0}}
    assert log.summary.orphans == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"score": 1.0}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x"}, "score"),
        ({"request_id": "x", "score": 0.5, "correct": True}, "score"),
        ({"request_id": "x", "score": 1.5}, "score"),
        ({"request_id": "x", "score": "good"}, "score"),
        ({"request_id": "x", "re_ask": False}, "re_ask"),
        ({"request_id": "x", "correct": True, "stars": 5}, "stars"),
    ],
)
async def test_mistakes_are_named(body: dict[str, object], param: str, tmp_path: Path) -> None:
    async with client(settings=_settings(tmp_path)) as http:  # type: ignore[arg-type]
        answer = await http.post("/v1/feedback", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_without_a_log_there_is_nothing_to_add_to() -> None:
    async with client() as http:
        answer = await _say(http, "x", score=1.0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_request_log")


async def test_a_body_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async with client(settings=_settings(tmp_path)) as http:  # type: ignore[arg-type]
        answer = await http.post("/v1/feedback", content=b" " * 20_000)
    assert answer.status_code == 413


async def test_a_full_disk_is_told_to_whoever_waits_and_fails_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: LogFiles, lines: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LogFiles, "append", full)
    async with client(settings=_settings(tmp_path)) as http:  # type: ignore[arg-type]
        request_id = await _ask(http)
        answer = await _say(http, request_id, score=1.0)
    assert answer.status_code == 503
    assert "No space left" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
