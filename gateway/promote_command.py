"""`outrider promote` and `outrider rollback`: which router the running gateways serve."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from gateway.auto.artifact_folder import ArtifactFolder, Pointer
from router_models.errors import RouterError

_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_POLL_S = 0.2

Folder = Annotated[
    Path,
    typer.Option(envvar="OUTRIDER_ARTIFACTS", help="the gateways' auto.artifact_folder, shared by all that serve it"),
]
Url = Annotated[str | None, typer.Option(help="a gateway to wait for, until it serves the router; none if not given")]
Wait = Annotated[float, typer.Option(min=0.1, help="seconds to wait for it")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]

DEFAULT_FOLDER = Path("~/.outrider/artifacts")


def promote(
    artifact: Annotated[str, typer.Argument(help="an artifact's folder, or default")],
    folder: Folder = DEFAULT_FOLDER,
    url: Url = None,
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Have running gateways serve a router. It is checked and copied first; the one before it is kept."""
    with _reported():
        from router_models.artifact import resolve  # scikit-learn takes a second to import

        pointer = ArtifactFolder(folder).promote(resolve(artifact).expanduser())
    _finish(pointer, folder, url, wait, as_json)


def rollback(folder: Folder = DEFAULT_FOLDER, url: Url = None, wait: Wait = 10.0, as_json: AsJson = False) -> None:
    """Have running gateways serve the router before the current one again."""
    with _reported():
        pointer = ArtifactFolder(folder).rollback()
    _finish(pointer, folder, url, wait, as_json)


def _finish(pointer: Pointer, folder: Path, url: str | None, wait_s: float, as_json: bool) -> None:
    if url is not None:
        _wait(pointer.version, url, wait_s)
    before = pointer.history[-1] if pointer.history else None
    if as_json:
        typer.echo(
            json.dumps({"version": pointer.version, "before": before, "folder": str(folder), "served": bool(url)})
        )
    else:
        state = f"{url} serves it." if url else "Gateways that watch this folder take it up within seconds."
        _console.print(f"{folder}: {pointer.version} is current. {state}", markup=False)


def _wait(version: str, url: str, wait_s: float) -> None:
    """Until that gateway serves this version; ends with status 1 where it does not, and says why."""
    deadline_s, reason = time.monotonic() + wait_s, ""
    while time.monotonic() < deadline_s:
        found, reason = _served(url)
        if found == version:
            return
        time.sleep(_POLL_S)
    _fail(f"{url} does not serve {version}: {reason or 'it does not watch this folder'}")


def _served(url: str) -> tuple[str | None, str]:
    """The version that a gateway serves, and what it says is wrong."""
    try:
        answer = httpx.get(f"{url.rstrip('/').removesuffix('/v1')}/v1/router", timeout=5.0)
        answer.raise_for_status()
        status = answer.json()["auto"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        return None, f"no answer ({error})"
    if status is None:
        return None, "it has no automatic choice"
    return status["artifact"], status["error"] or ""


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RouterError as error:
        _fail(error.message)


def _fail(message: str) -> None:
    _errors.print(message, style="red", markup=False)
    raise typer.Exit(1)
