"""`outrider route` in words, against a gateway that answers what it is told to."""

import httpx
import pytest
from rich.console import Console

from gateway.chat_answer import ChatError
from gateway.route_command import ask, show

CANDIDATE = {"replica": "r1", "chosen": True, "set_aside": None, "expected_s": 0.25, "score": 0.5, "warm_tokens": 64}
CANDIDATE |= {"new_tokens": 3, "queued_tokens": 0.0, "in_flight": None}
OTHER = CANDIDATE | {"replica": "r2", "chosen": False, "set_aside": "in flight"}
ENTRY = {"chosen": "r1", "reason": "warm", "state": "shared", "candidates": [CANDIDATE, OTHER]}
MODEL = {"chosen": "m", "reason": "named"}


def _client(*answers: httpx.Response, asked: list[httpx.Request] | None = None) -> httpx.Client:
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        if asked is not None:
            asked.append(request)
        return left.pop(0)

    return httpx.Client(base_url="http://gateway/v1", transport=httpx.MockTransport(answer))


def _shown(replica: dict[str, object]) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        show({"model": MODEL, "replica": replica}, console)
        return console.export_text()


def test_the_first_model_is_asked_for_when_none_is_named() -> None:
    asked: list[httpx.Request] = []
    models = httpx.Response(200, json={"data": [{"id": "first"}]})
    with _client(models, httpx.Response(200, json={"model": MODEL}), asked=asked) as http:
        assert ask(http, "hi", None, False, "salt") == {"model": MODEL}
    assert [request.url.path for request in asked] == ["/v1/models", "/v1/route"]
    assert b'"messages"' in asked[1].content
    assert b'"salt"' in asked[1].content


def test_a_text_completion_is_asked_as_one() -> None:
    asked: list[httpx.Request] = []
    with _client(httpx.Response(200, json={}), asked=asked) as http:
        ask(http, "hi", "m", True, None)
    assert asked[0].content == b'{"model":"m","prompt":"hi"}'


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(404, json={"error": {"message": "No such model."}}), "No such model."),
        (httpx.Response(200, text="<html>"), "address of a gateway"),
        (httpx.Response(502), "502"),
    ],
)
def test_what_goes_wrong_is_said_in_words(answer: httpx.Response, words: str) -> None:
    with _client(answer) as http, pytest.raises(ChatError) as caught:
        ask(http, "hi", "m", False, None)
    assert words in caught.value.message


def test_a_gateway_that_is_away_is_a_line() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    http = httpx.Client(base_url="http://gateway/v1", transport=httpx.MockTransport(refuse))
    with http, pytest.raises(ChatError, match="refused"):
        ask(http, "hi", "m", False, None)


def test_the_table_says_why_and_what_is_unknown() -> None:
    shown = _shown({"policy": "warm", "prompts": [ENTRY]})
    assert "r1 (warm; state: shared)" in shown
    rows = {
        cells[0]: cells for line in shown.splitlines() if (cells := [c.strip() for c in line.strip("│ ").split("│")])
    }
    assert rows["r1"][1:] == ["0.2500", "0.5000", "64", "3", "0", "?", "chosen"]
    assert rows["r2"][-1] == "in flight"


@pytest.mark.parametrize(
    ("replica", "words"),
    [
        ({"policy": "single", "prompts": []}, "there is one"),
        ({"policy": "two_choices", "prompts": [{}]}, "left to Serve"),
        ({"policy": "round_robin", "prompts": [{"chosen": "r3"}]}, "r3 (round_robin)"),
    ],
)
def test_other_policies_are_a_line(replica: dict[str, object], words: str) -> None:
    assert words in _shown(replica)
