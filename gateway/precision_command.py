"""`outrider precision`: measure a model at several precisions on given data and name the lowest that is good enough."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engines.errors import EngineError
from engines.precision.candidates import KV_PRECISIONS, PRECISIONS, candidates
from engines.precision.data import read_rows

if TYPE_CHECKING:
    from engines.precision.findings import Finding
    from engines.precision.gate import Report
    from engines.precision.measure import Progress
    from engines.precision.scorer import Scorer

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_MIB = 1 << 20
_TABLE_WIDTH = 120  # a narrower terminal wraps whole lines, which reads better than cut-off cells


def precision(
    model: Annotated[str, typer.Argument(help="a folder in Hugging Face format, a GGUF file or a hub id")],
    data: Annotated[Path, typer.Option(help="JSON lines: text, or prompt or messages with a reference")],
    bound: Annotated[float, typer.Option(min=0.0, help="allowed relative increase in loss; 0.01 is 1 %")] = 0.01,
    precisions: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8, int4; the first is what the others are compared with")
    ] = "bf16,int8,int4",
    kv: Annotated[str, typer.Option(help="of the KV cache: auto, int8")] = "auto,int8",
    confidence: Annotated[float, typer.Option(help="of the two-sided interval, between 0 and 1")] = 0.95,
    limit: Annotated[int | None, typer.Option(min=1, help="use only the first rows")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="of a greedy answer; 0 asks for none")] = 64,
    scorer: Annotated[str | None, typer.Option(help="module:function, called with a row and an answer")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="end with one line of JSON")] = False,
) -> None:
    """Name the lowest precision whose loss on your data stays within a bound.

    Exit status 0 if that is below the first precision, 1 if the first has to stay or nothing could be measured.
    """
    names = _names("--precisions", precisions, list(PRECISIONS))
    kv_names = _names("--kv", kv, list(KV_PRECISIONS))
    if not 0 < confidence < 1:
        raise typer.BadParameter("is to be between 0 and 1", param_hint="--confidence")
    # torch and transformers take seconds to import.
    from engines.precision.findings import Settings
    from engines.precision.gate import run_gate

    try:
        settings = Settings(bound, confidence, max_new_tokens, _scorer(scorer))
        rows = read_rows(data, limit)
        with _progress() as progress:
            report = run_gate(candidates(model, names, kv_names, device), rows, settings, progress)
    except EngineError as error:
        _errors.print(error.message, style="red", markup=False)
        raise typer.Exit(1) from error
    _show(report)
    if as_json:
        about = {"model": model, "data": str(data), "bound": bound, "confidence": confidence}
        typer.echo(json.dumps(about | _document(report)))
    raise typer.Exit(0 if report.is_lower else 1)


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)
    if len(set(names)) < len(names):
        raise typer.BadParameter("a name is there twice", param_hint=option)
    return names


def _scorer(name: str | None) -> Scorer | None:
    from engines.precision.scorer import load_scorer

    if name is None:
        return None
    sys.path.insert(0, "")  # import from where the command is run, as `python -m` does
    return load_scorer(name)


@contextmanager
def _progress() -> Iterator[Progress]:
    """On a terminal one line that moves, elsewhere a line for each stage; on stderr."""
    stage_shown = ""
    with _errors.status("") as status:

        def show(stage: str, done: int, total: int) -> None:
            nonlocal stage_shown
            if stage != stage_shown:
                stage_shown = stage
                _errors.print(stage, markup=False)
            status.update(f"{stage} {done}/{total}" if total else stage)

        yield show


def _show(report: Report) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("precision", no_wrap=True)
    for title in ("MiB", "KV B/token", "loss", "increase", "interval", "tokens", "answers", "match", "score"):
        table.add_column(title, justify="right", no_wrap=True)
    errors = []
    for finding in report.findings:
        table.add_row(finding.name, *([] if finding.error else _cells(finding)))
        errors += [f"{finding.name} could not be measured: {finding.error}"] if finding.error else []
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.width >= _TABLE_WIDTH else Console(highlight=False, soft_wrap=True, width=_TABLE_WIDTH)
    console.print(table)
    for line in (*errors, f"Recommended: {report.recommended}. {report.reason}"):
        console.print(line, markup=False)


def _cells(finding: Finding) -> list[str]:
    increase = finding.increase
    return [
        _number(finding.weight_bytes / _MIB if finding.weight_bytes else None, ".1f"),
        _number(finding.kv_bytes_per_token, ".0f"),
        _number(finding.loss, ".4f"),
        _number(increase.estimate if increase else None, "+.2%"),
        f"{increase.low:+.2%} {increase.high:+.2%}" if increase else "",
        _number(finding.token_agreement, ".1%"),
        _number(finding.same_answers, ".1%"),
        _number(finding.exact_match, ".1%"),
        _number(finding.score, ".3f"),
    ]


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _document(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report) | {"is_lower": report.is_lower}
