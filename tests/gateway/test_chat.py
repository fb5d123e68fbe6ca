"""`outrider chat` over the in-memory application's own answers."""

import io
import json

import httpx
import pytest
from rich.console import Console

from gateway.chat import Answer, Chat, ChatError


def _sse(*payloads: object, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(payload)}\n\n" for payload in payloads] + ["data: [DONE]\n\n"] * done
    return "".join(lines).encode()


def _text(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}}], "usage": None}


USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


class Gateway:
    """Lists one model and answers with these bodies, one after another; remembers what it was asked."""

    def __init__(self, *bodies: bytes | httpx.Response) -> None:
        self.bodies = list(bodies)
        self.asked: list[dict[str, object]] = []
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        self.asked.append(json.loads(request.content))
        body = self.bodies.pop(0)
        return body if isinstance(body, httpx.Response) else httpx.Response(200, content=body)

    def chat(self, url: str = "http://gateway", **options: object) -> Chat:
        return Chat(url, transport=httpx.MockTransport(self), **options)


def test_turns_are_remembered_and_the_first_model_is_taken() -> None:
    gateway = Gateway(_sse(_text("Hel"), _text("lo"), USAGE), _sse(_text("Bye")))
    with gateway.chat(max_tokens=5) as chat:
        answer = Answer()
        assert list(chat.ask("Hi", answer)) == ["Hel", "lo"]
        list(chat.ask("More", Answer()))
    assert (answer.text, answer.num_tokens) == ("Hello", 7)
    assert "7 tokens" in answer.speed()
    assert gateway.asked[0]["model"] == "first"
    assert gateway.asked[0]["max_tokens"] == 5
    assert [message["content"] for message in gateway.asked[1]["messages"]] == ["Hi", "Hello", "More"]


def test_ctrl_c_keeps_what_came_and_goes_on() -> None:
    gateway = Gateway(_sse(_text("Hel"), _text("lo")), _sse(_text("Yes")))
    with gateway.chat(model="second") as chat:
        answer = Answer()
        pieces = chat.ask("Hi", answer)
        next(pieces)
        with pytest.raises(StopIteration):
            pieces.throw(KeyboardInterrupt)
        list(chat.ask("There?", Answer()))
    assert answer.was_stopped
    assert [message["content"] for message in gateway.asked[1]["messages"]] == ["Hi", "Hel", "There?"]


@pytest.mark.parametrize(
    "body",
    [
        httpx.Response(429, json={"error": {"message": "The queue is full."}}),
        _sse(_text("a"), {"error": {"message": "The queue is full."}}),
    ],
    ids=["status", "event"],
)
def test_an_error_is_raised_and_the_question_forgotten(body: bytes | httpx.Response) -> None:
    with Gateway(body).chat() as chat, pytest.raises(ChatError, match=r"The queue is full\."):
        list(chat.ask("Hi", Answer()))
    assert chat.messages == []


def test_a_strange_answer_is_told_by_its_status() -> None:
    with Gateway(httpx.Response(502, text="<html>")).chat() as chat, pytest.raises(ChatError, match="answered 502"):
        list(chat.ask("Hi", Answer()))


def test_an_absent_gateway_is_one_line() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    with pytest.raises(ChatError, match="cannot be reached: Connection refused"):
        Chat("http://gateway", transport=httpx.MockTransport(refuse))


def test_the_conversation_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(
        _sse(_text("[Hel"), _text("lo]"), USAGE), httpx.Response(503, json={"error": {"message": "Gone."}})
    )
    questions = iter(["Hi", "  ", "Again"])

    def read(*_: object) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    output = io.StringIO()
    console = Console(file=output, width=100)
    monkeypatch.setattr(console, "input", read)
    with gateway.chat() as chat:
        chat.run(console, system="Be brief.")
    assert "Talking to first." in output.getvalue()
    assert "[Hello]\n(7 tokens" in output.getvalue()
    assert "Gone." in output.getvalue()
    assert gateway.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(prefix: str, end: str) -> None:
    gateway = Gateway(_sse(_text("a")))
    with gateway.chat(f"http://gateway{prefix}{end}", model="first") as chat:
        list(chat.ask("Hi", Answer()))
    assert gateway.paths == [f"{prefix}/v1/chat/completions"]


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"", b"data: <html>\n\n", b"data: [1]\n\n", b'data: {"choices": [1]}\n\n', b'data: {"error": 1}\n\n'],
)
def test_what_is_no_answer_of_openais_api_is_one_line(body: bytes) -> None:
    with Gateway(body).chat() as chat, pytest.raises(ChatError, match=r"^The answer is not one of OpenAI's API\..*$"):
        list(chat.ask("Hi", Answer()))


@pytest.mark.parametrize("body", ["<html>", "[]", '{"data": [1]}', '{"data": {"a": 1}}'])
def test_what_is_no_list_of_models_is_one_line(body: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=body))
    with pytest.raises(ChatError, match=r"^The answer is not one of OpenAI's API\..*$"):
        Chat("http://gateway", transport=transport)


def test_what_is_no_address_is_one_line() -> None:
    with pytest.raises(ChatError, match="no address"):
        Chat("http://gateway:port")
