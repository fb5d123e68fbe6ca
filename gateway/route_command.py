"""`outrider route`: which model and which replica a prompt would go to now, and why, without inference."""

from __future__ import annotations

import json
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from gateway.chat_answer import STRANGE, ChatError, JsonObject, object_of, raise_for_error

_TIMEOUT_S = 30.0
_COLUMNS = ("replica", "expected s", "score", "warm tokens", "new tokens", "queued", "in flight", "")


def route(
    prompt: Annotated[str, typer.Argument(help="one user message; with --text the whole prompt")],
    url: Annotated[str, typer.Option(help="the gateway's address, with or without /v1")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="the model; the gateway's first if not given")] = None,
    text: Annotated[bool, typer.Option("--text", help="a text completion instead of a chat")] = False,
    cache_salt: Annotated[str | None, typer.Option(help="the tenant's, if it has one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Show which model and which replica a prompt would go to now, and why. Nothing is computed."""
    try:
        with httpx.Client(base_url=_base(url), timeout=_TIMEOUT_S) as http:
            decision = ask(http, prompt, model, text, cache_salt)
    except ChatError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(error.message, style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(decision))
    else:
        show(decision, Console(highlight=False))


def ask(http: httpx.Client, prompt: str, model: str | None, text: bool, cache_salt: str | None) -> JsonObject:
    """The answer of POST /v1/route. Raises ChatError in words for the user."""
    try:
        body: JsonObject = {"model": _first_model(http) if model is None else model}
        body |= {"prompt": prompt} if text else {"messages": [{"role": "user", "content": prompt}]}
        body |= {} if cache_salt is None else {"cache_salt": cache_salt}
        return _checked(http.post("/route", json=body))
    except httpx.HTTPError as error:
        raise ChatError(f"The gateway at {http.base_url} does not answer: {error}") from error


def show(decision: JsonObject, console: Console) -> None:
    """The decision as a line on the model and a table of replicas."""
    chosen = _object(decision.get("model"))
    console.print(f"model: {chosen.get('chosen')} ({chosen.get('reason')})", markup=False)
    replica = _object(decision.get("replica"))
    prompts = replica.get("prompts")
    entries = [_object(entry) for entry in prompts] if isinstance(prompts, list) else []
    candidates = entries[0].get("candidates") if entries else None
    if not isinstance(candidates, list) or not candidates:
        console.print(f"replica: {_no_table(replica, entries)}", markup=False)
        return
    entry = entries[0]
    told = f"{entry.get('chosen')} ({entry.get('reason')}; state: {entry.get('state')})"
    console.print(f"replica: {told}", markup=False)
    table = Table(*_COLUMNS)
    for candidate in candidates:
        table.add_row(*_row(_object(candidate)))
    console.print(table)


def _no_table(replica: JsonObject, entries: list[JsonObject]) -> str:
    policy = str(replica.get("policy"))
    if policy == "single":
        return "there is one"
    return f"{entries[0].get('chosen') or 'left to Serve'} ({policy})" if entries else policy


def _row(candidate: JsonObject) -> list[str]:
    why = "chosen" if candidate.get("chosen") else str(candidate.get("set_aside") or "")
    return [
        str(candidate.get("replica")),
        _number(candidate.get("expected_s"), 4),
        _number(candidate.get("score"), 4),
        _number(candidate.get("warm_tokens")),
        _number(candidate.get("new_tokens")),
        _number(candidate.get("queued_tokens")),
        _number(candidate.get("in_flight")),
        why,
    ]


def _number(value: object, digits: int = 0) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "?"


def _first_model(http: httpx.Client) -> str:
    data = _checked(http.get("/models")).get("data")
    if not isinstance(data, list) or not data:
        raise ChatError("The gateway serves no model yet.")
    return str(_object(data[0]).get("id"))


def _checked(response: httpx.Response) -> JsonObject:
    raise_for_error(response)
    return object_of(response.text)


def _object(value: Any) -> JsonObject:
    if not isinstance(value, dict):
        raise ChatError(STRANGE)
    return value


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1") + "/v1"
