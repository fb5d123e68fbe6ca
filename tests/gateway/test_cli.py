"""The command's own part: messages, exit statuses, JSON. What it starts is in test_serve.py."""

import json
import socket
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from gateway.chat import Chat
from gateway.cli import app
from tests.gateway.fake_gateway import Gateway, sse, told

ROOT = Path(__file__).parent.parent.parent
ECHO = str(ROOT / "configs" / "echo.yaml")


def test_check_summarises() -> None:
    result = CliRunner().invoke(app, ["check", ECHO])
    assert (result.exit_code, result.stdout) == (0, "echo: echo echo, 1 replica(s)\n")


def test_check_prints_one_json_document() -> None:
    result = CliRunner().invoke(app, ["check", ECHO, "--json"])
    assert json.loads(result.stdout)["models"][0]["kind"] == "echo"


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_bad_configuration_is_a_line_and_a_status(command: str, tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("speed: fast")
    result = CliRunner().invoke(app, [command, str(path)])
    assert result.exit_code == 1
    assert "speed: Extra inputs are not permitted" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["serve", ECHO, "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert "Cannot listen on 127.0.0.1" in result.stderr


@pytest.mark.parametrize("port", ["99999", "0", "-1", "http"])
def test_a_port_that_cannot_be_is_a_usage_error(port: str) -> None:
    result = CliRunner().invoke(app, ["serve", ECHO, "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.stderr


@pytest.mark.parametrize(
    ("host", "words"), [("", "host: String"), ("ö", "host: String"), ("no.such.invalid", "Cannot listen")]
)
def test_a_host_that_cannot_be_is_a_line(host: str, words: str) -> None:
    result = CliRunner().invoke(app, ["serve", ECHO, "--host", host])
    assert result.exit_code == 1
    assert words in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_chat_without_a_gateway_is_a_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        result = CliRunner().invoke(app, ["chat", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}"])
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr


@pytest.mark.parametrize(
    ("options", "is_asked"), [([], True), (["--show-drafts"], True), (["--no-show-drafts"], False)]
)
def test_chat_asks_who_drafted_what_unless_told_not_to(
    options: list[str], is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway(sse(told(("Hello", "ngram"))))

    class Here(Chat):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, transport=httpx.MockTransport(gateway))  # type: ignore[arg-type]

    monkeypatch.setattr("gateway.chat.Chat", Here)
    result = CliRunner().invoke(app, ["chat", *options], input="Hi\n")
    assert result.exit_code == 0, result.output
    assert "Hello\n(1 tokens" in result.stdout
    assert ("speculation" in gateway.asked[0]) == is_asked
