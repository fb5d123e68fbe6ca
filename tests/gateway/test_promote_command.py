"""`outrider promote` and `rollback`."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.auto.artifact_folder import ArtifactFolder
from gateway.cli import app
from tests.gateway.auto_world import damaged, version_of


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class _Gateway(BaseHTTPRequestHandler):
    """Serves whatever is current in a folder, as a running gateway would after a moment."""

    folder: Path
    error: str | None = None

    def do_GET(self) -> None:
        pointer = ArtifactFolder(self.folder).pointer()
        version = None if pointer is None or self.error else pointer.version
        body = json.dumps({"object": "router", "auto": {"artifact": version, "error": self.error}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[str, type[_Gateway]]]:
    handler = type("Handler", (_Gateway,), {"folder": tmp_path / "a"})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_promotion_and_rollback_print_one_document(router: Path, other_router: Path, tmp_path: Path) -> None:
    first = json.loads(_run("promote", router, "--folder", tmp_path / "a", "--json").stdout)
    assert first == {
        "version": version_of(router), "before": None, "folder": str(tmp_path / "a"), "served": False
    }  # fmt: skip
    second = json.loads(_run("promote", other_router, "--folder", tmp_path / "a", "--json").stdout)
    assert (second["version"], second["before"]) == (version_of(other_router), version_of(router))
    back = json.loads(_run("rollback", "--folder", tmp_path / "a", "--json").stdout)
    assert (back["version"], back["before"]) == (version_of(router), None)


def test_the_shipped_router_can_be_promoted(tmp_path: Path) -> None:
    assert "is current" in _run("promote", "default", "--folder", tmp_path).stdout


def test_the_folder_may_come_from_the_environment(
    router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_ARTIFACTS", str(tmp_path / "env"))
    assert _run("promote", router).exit_code == 0
    assert ArtifactFolder(tmp_path / "env").pointer() is not None


def test_what_cannot_be_promoted_is_one_line_and_status_1(router: Path, tmp_path: Path) -> None:
    bad = damaged(router, tmp_path / "bad")
    for arguments, words in (
        (("promote", bad), "does not match its checksum"),
        (("promote", tmp_path / "absent"), "artifact.json"),
        (("rollback",), "no earlier version"),
    ):
        result = _run(*arguments, "--folder", tmp_path / "a")
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert words in result.stderr


def test_a_gateway_is_waited_for(router: Path, tmp_path: Path, gateway: tuple[str, type[_Gateway]]) -> None:
    result = _run("promote", router, "--folder", tmp_path / "a", "--url", gateway[0] + "/v1", "--json")
    assert json.loads(result.stdout)["served"] is True


@pytest.mark.parametrize(("error", "words"), [("arrays.npz is gone", "arrays.npz is gone"), (None, "does not watch")])
def test_a_gateway_that_does_not_follow_says_why(
    error: str | None, words: str, router: Path, tmp_path: Path, gateway: tuple[str, type[_Gateway]]
) -> None:
    url, handler = gateway
    handler.error = error
    folder = tmp_path / ("a" if error else "elsewhere")
    result = _run("promote", router, "--folder", folder, "--url", url, "--wait", "0.3")
    assert result.exit_code == 1
    assert words in result.stderr


def test_no_gateway_at_all_is_said(router: Path, tmp_path: Path) -> None:
    result = _run("promote", router, "--folder", tmp_path, "--url", "http://127.0.0.1:9", "--wait", "0.1")
    assert (result.exit_code, "no answer" in result.stderr) == (1, True)
