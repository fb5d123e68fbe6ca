"""The `outrider` command."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gateway.errors import ConfigError, DeployError
from gateway.precision_command import precision
from gateway.promote_command import promote, rollback
from gateway.quantize_command import quantize
from gateway.replay_command import replay
from gateway.route_command import route
from gateway.router_commands import evaluate, train
from gateway.serve_file import load_serve_file

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A gateway for self-hosted language models.",
)
_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigPath = Annotated[Path, typer.Argument(help="a Serve config whose application is gateway.app:build_app")]


@app.command()
def check(
    config: ConfigPath, as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False
) -> None:
    """Check a configuration as far as that is possible without loading models."""
    from gateway.checks import check_file

    try:
        summary = check_file(load_serve_file(config))
    except ConfigError as error:
        _fail(error.message)
    if as_json:
        typer.echo(json.dumps({"config": str(config), "models": [line.as_dict() for line in summary]}))
        return
    for line in summary:
        _console.print(line.text())


@app.command()
def serve(
    config: ConfigPath,
    host: Annotated[str | None, typer.Option(help="address to listen on; overrides the file's")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port to listen on; overrides the file's")] = None,
    logs: Annotated[bool, typer.Option(help="show the logs of all processes")] = False,
) -> None:
    """Start the gateway and its engines on this machine, in the foreground, after checking the configuration."""
    from gateway.checks import check_file
    from gateway.cluster import running

    _interrupt_on_signals()
    is_ready = False
    try:
        file = load_serve_file(config).at(host, port)
        for line in check_file(file):
            _console.print(line.text())
        _console.print("Starting Ray and loading the models; this can take a minute ...")
        with running(file, logs) as gateway:
            is_ready = True
            _console.print(f"Logs, until it stops: {gateway.log_folder} (--logs shows them here)")
            _console.print(_ready_line(gateway.url, file.application.args.models[0].name))
            threading.Event().wait()
    except (ConfigError, DeployError) as error:
        _fail(error.message)
    except KeyboardInterrupt:
        _console.print("Stopped." if is_ready else "Stopped before it was ready.")
        raise typer.Exit(0 if is_ready else 130) from None


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="the gateway's address, with or without /v1")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="the model; the gateway's first if not given")] = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="limit of one answer; the context's if not given")
    ] = None,
    show_drafts: Annotated[
        bool, typer.Option(help="colour the tokens that were drafted, where the server tells them apart")
    ] = True,
) -> None:
    """Talk to a running gateway. Ctrl-C stops the answer, Ctrl-D ends the conversation."""
    from gateway.chat import Chat
    from gateway.chat_answer import ChatError
    from gateway.terminal import Terminal

    try:
        with Chat(url, model, temperature, max_tokens, show_drafts) as conversation:
            Terminal(conversation, _console).run(system)
    except ChatError as error:
        _fail(error.message)


app.command()(precision)
app.command()(train)
app.command()(evaluate)
app.command()(replay)
app.command()(route)
app.command()(promote)
app.command()(rollback)
app.command()(quantize)


def main() -> None:
    """The entry point of the `outrider` script."""
    app()


def _fail(message: str) -> None:
    _errors.print(message, style="red", markup=False)
    raise typer.Exit(1)


def _interrupt_on_signals() -> None:
    """Turn the first Ctrl-C or SIGTERM into a KeyboardInterrupt, and let nothing interrupt the stopping."""

    def interrupt(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _console.print("Stopping ...")
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _ready_line(url: str, model: str) -> str:
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "What does len do?"}]})
    return f"Ready at {url}  Try: curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
