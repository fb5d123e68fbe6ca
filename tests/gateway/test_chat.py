"""`outrider chat` over the in-memory application's own answers."""

import httpx
import pytest

from gateway.chat import Chat
from gateway.chat_answer import Answer, ChatError, Span
from tests.gateway.fake_gateway import REFUSAL, USAGE, Gateway, sse, text, told, usage


def test_turns_are_remembered_and_the_first_model_is_taken() -> None:
    gateway = Gateway(sse(text("Hel"), text("lo"), USAGE), sse(text("Bye")))
    with gateway.chat(max_tokens=5) as chat:
        answer = Answer()
        assert list(chat.ask("Hi", answer)) == [Span("Hel"), Span("lo")]
        list(chat.ask("More", Answer()))
    assert (answer.text, answer.num_tokens) == ("Hello", 7)
    assert answer.summary().startswith("7 tokens, ")
    assert "drafted" not in answer.summary()
    assert "speculation" not in gateway.asked[0]
    assert gateway.asked[0]["model"] == "first"
    assert gateway.asked[0]["max_tokens"] == 5
    assert [message["content"] for message in gateway.asked[1]["messages"]] == ["Hi", "Hello", "More"]


def test_ctrl_c_keeps_what_came_and_goes_on() -> None:
    gateway = Gateway(sse(text("Hel"), text("lo")), sse(text("Yes")))
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
        sse(text("a"), {"error": {"message": "The queue is full."}}),
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


def test_drafted_tokens_are_told_apart_and_counted() -> None:
    body = sse(told(), told(("Hel", "ngram"), ("lo", "target")), told(("", "model")), told(("!", "model")), USAGE)
    gateway = Gateway(body)
    with gateway.chat(asks_provenance=True) as chat:
        answer = Answer()
        assert list(chat.ask("Hi", answer)) == [Span("Hel", "ngram"), Span("lo", "target"), Span("!", "model")]
    assert gateway.asked[0]["speculation"] == {"provenance": True}
    assert (answer.text, answer.num_tokens, answer.num_drafted) == ("Hello!", 7, 3)
    assert answer.summary().endswith("43% drafted")


def test_an_answer_that_was_stopped_has_counted_its_tokens() -> None:
    with Gateway(sse(told(("a", "ngram"), ("b", "target")), text("never"))).chat(asks_provenance=True) as chat:
        answer = Answer()
        pieces = chat.ask("Hi", answer)
        next(pieces)
        with pytest.raises(StopIteration):
            pieces.throw(KeyboardInterrupt)
    assert (answer.num_tokens, answer.num_drafted) == (2, 1)
    assert answer.summary().endswith("50% drafted, stopped")


@pytest.mark.parametrize(("num_accepted", "words"), [(6, "75% drafted"), (0, "0% drafted"), (None, "tokens/s")])
def test_without_provenance_the_usage_tells_the_share(num_accepted: int | None, words: str) -> None:
    with Gateway(sse(text("a"), usage(num_accepted))).chat() as chat:
        answer = Answer()
        list(chat.ask("Hi", answer))
    assert answer.summary().endswith(words)


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_to_tell_is_asked_once(status: int) -> None:
    gateway = Gateway(httpx.Response(status, json=REFUSAL), sse(text("a")), sse(text("b")))
    with gateway.chat(asks_provenance=True) as chat:
        assert list(chat.ask("Hi", Answer())) == [Span("a")]
        assert not chat.asks_provenance
        assert list(chat.ask("More", Answer())) == [Span("b")]
    assert ["speculation" in asked for asked in gateway.asked] == [True, False, False]
    assert [message["content"] for message in gateway.asked[2]["messages"]] == ["Hi", "a", "More"]


def test_another_fault_is_no_reason_to_stop_asking() -> None:
    fault = {"error": {"message": "The context is too long."}}
    gateway = Gateway(*[httpx.Response(400, json=fault)] * 2, sse(told(("a", "ngram"))))
    with gateway.chat(asks_provenance=True) as chat:
        with pytest.raises(ChatError, match="too long"):
            list(chat.ask("Hi", Answer()))
        assert list(chat.ask("Hi", Answer())) == [Span("a", "ngram")]
    assert ["speculation" in asked for asked in gateway.asked] == [True, False, True]


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_other_statuses_are_not_asked_again(status: int) -> None:
    gateway = Gateway(httpx.Response(status, json={"error": {"message": "No."}}))
    with gateway.chat(asks_provenance=True) as chat, pytest.raises(ChatError, match=r"No\."):
        list(chat.ask("Hi", Answer()))
    assert len(gateway.asked) == 1


@pytest.mark.parametrize(
    "provenance",
    ["a web page", 7, [1], [{"text": "a"}], {"source": "x"}, [{"text": "other", "source": "x"}], [], None],
    ids=str,
)
def test_what_another_server_means_by_provenance_is_left_alone(provenance: object) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "a"}, "provenance": provenance}]}
    with Gateway(sse(chunk)).chat(asks_provenance=True) as chat:
        answer = Answer()
        assert list(chat.ask("Hi", answer)) == [Span("a")]
    assert (answer.num_tokens, answer.num_drafted) == (1, None)


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(prefix: str, end: str) -> None:
    gateway = Gateway(sse(text("a")))
    with gateway.chat(f"http://gateway{prefix}{end}", model="first") as chat:
        list(chat.ask("Hi", Answer()))
    assert gateway.paths == [f"{prefix}/v1/chat/completions"]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"data: <html>\n\n",
        b"data: [1]\n\n",
        b'data: {"choices": [1]}\n\n',
        b'data: {"error": 1}\n\n',
        b'data: {"usage": 1}\n\n',
        b'data: {"usage": {"completion_tokens": "x"}}\n\n',
    ],
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
