"""`outrider quantize`: write a checkpoint with int8 or int4 weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from engines.errors import EngineError

if TYPE_CHECKING:
    from engines.quant.convert import Conversion

_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Target(StrEnum):
    """What a checkpoint can be quantized to."""

    INT8 = "int8"
    INT4 = "int4"


class GroupSize(StrEnum):
    """Inputs that share an int4 scale."""

    SMALL = "32"
    MEDIUM = "64"
    LARGE = "128"


def quantize(
    model: Annotated[str, typer.Argument(help="a folder in Hugging Face format or a hub id")],
    to: Annotated[Target, typer.Option(help="of all linear layers; the output layer is int8 in both")],
    out: Annotated[Path, typer.Option(help="a folder that is new or empty")],
    revision: Annotated[str | None, typer.Option(help="hub revision")] = None,
    group_size: Annotated[GroupSize, typer.Option(help="int4: inputs with one scale")] = GroupSize.SMALL,
    keep_head: Annotated[
        bool, typer.Option("--keep-head", help="leave the output layer as it is, for other software that expects that")
    ] = False,
) -> None:
    """Write a checkpoint with int8 or int4 weights in the compressed-tensors format."""
    # torch and transformers take seconds to import.
    from engines.quant.convert import convert

    bar = Progress(TextColumn("layers"), BarColumn(), MofNCompleteColumn(), console=_errors, transient=True)
    try:
        with bar:
            task = bar.add_task("layers", total=None)
            done = convert(
                model,
                out,
                to.value,
                revision=revision,
                group_size=int(group_size),
                keep_head=keep_head,
                progress=lambda layer, layers: bar.update(task, completed=layer, total=layers),
            )
    except EngineError as error:
        _errors.print(error.message, style="red", markup=False)
        raise typer.Exit(1) from error
    for line in _lines(done, out):
        _console.print(line, markup=False)


def _lines(done: Conversion, out: Path) -> list[str]:
    return [
        f"{done.num_layers} layers quantized; copied {', '.join(done.companions) or 'nothing else'}",
        f"on disk    {_size(done.disk_before)} before, {_size(done.disk_after)} in {out}",
        f"in memory  {_size(done.memory_before)} before, {_size(done.memory_after)} now"
        f" ({_size(done.memory_planned)} planned)",
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
