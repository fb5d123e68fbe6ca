"""What `outrider chat` shows: text, colours where they are known, a line of numbers."""

import io

import httpx
import pytest
from rich.console import Console

from gateway.terminal import Terminal
from tests.gateway.fake_gateway import REFUSAL, USAGE, Gateway, sse, text, told

ESC = "\x1b["
CYAN, YELLOW, GREEN, BLUE = (f"{ESC}{code}m" for code in (36, 33, 32, 34))


def _shown(
    gateway: Gateway, questions: list[str], monkeypatch: pytest.MonkeyPatch, colours: bool = False, **options: object
) -> str:
    """All that the terminal showed in a conversation with these questions."""
    remaining = iter(questions)

    def read(*_: object) -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=colours, color_system="standard" if colours else None)
    monkeypatch.setattr(console, "input", read)
    with gateway.chat(**options) as chat:
        Terminal(chat, console).run(system="Be brief.")
    return output.getvalue()


def test_the_conversation_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = httpx.Response(503, json={"error": {"message": "Gone."}})
    gateway = Gateway(sse(text("[Hel"), text("lo]"), USAGE), gone)
    shown = _shown(gateway, ["Hi", "  ", "Again"], monkeypatch)
    assert "Talking to first." in shown
    assert "[Hello]\n(7 tokens" in shown
    assert "Gone." in shown
    assert "drafted" not in shown
    assert gateway.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_drafted_tokens_have_their_drafters_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = told(("[b]", "ngram"), ("own", "target"), ("é", "suffix"), ("m", "model"), ("?", "oracle"))
    shown = _shown(Gateway(sse(chunk)), ["Hi"], monkeypatch, colours=True, asks_provenance=True)
    answer = shown.split("Ctrl-D ends.")[1].split("(5 tokens")[0]
    for colour, words in ((CYAN, "[b]"), (YELLOW, "é"), (GREEN, "m"), (BLUE, "?")):
        assert f"{colour}{words}{ESC}0m" in answer
    assert f"{ESC}0mown{ESC}" in answer


def test_the_legend_comes_once_and_names_the_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [sse(told(("a", "target"))), *[sse(told(("b", "ngram"), ("c", "oracle")))] * 2]
    shown = _shown(Gateway(*bodies), ["One", "Two", "Three"], monkeypatch, asks_provenance=True)
    assert shown.count("(drafted by: prediction ngram suffix model oracle)") == 1
    assert shown.index("0% drafted") < shown.index("drafted by:")
    assert shown.count("100% drafted") == 2


def test_a_server_that_does_not_tell_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(httpx.Response(400, json=REFUSAL), sse(text("a")), sse(text("b")))
    shown = _shown(gateway, ["One", "Two"], monkeypatch, asks_provenance=True)
    assert shown.count("does not tell which tokens were drafted") == 1
    assert "Unrecognized" not in shown
    assert "drafted by" not in shown
