"""What `outrider train` takes on a gateway's own log: time and memory.

    python -m benchmarks.router_training --data FOLDER --rows 30000 --json

FOLDER has `prompts.parquet` and `outcomes.parquet`. The log is made of its largest source: one request for each of
some outcomes of six models, as if a gateway had sent it there and its answer had been judged. A number before every
prompt keeps those that several models answered apart, as those of real traffic are, and new to the shipped router, on
top of which training goes on. What the router is worth is measured by `benchmarks.router`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.environment import describe
from benchmarks.router_world import PAIRS
from router_models.data import Group, find, read_tables
from router_models.records import LoggedPrompt, LoggedTurn, LoggedUse, OutcomeRecord, RequestRecord

_SOURCE = "mmlu_pro"
_MODELS = tuple(model for source, *pair in PAIRS if source == _SOURCE for model in pair)


def main(
    data: Annotated[Path, typer.Option(help="folder with prompts.parquet and outcomes.parquet")],
    rows: Annotated[int, typer.Option(min=100, help="requests in the log")] = 30_000,
    embedding: Annotated[bool, typer.Option("--embedding", help="train with the sentence embedding")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON at the end")] = False,
) -> None:
    """Write a log, train on it in a process of its own, and print what that took."""
    with tempfile.TemporaryDirectory() as name:
        log, out = Path(name) / "log.jsonl", Path(name) / "router"
        models = write_log(find(read_tables(data), _SOURCE), _MODELS, rows, log)
        command = [sys.executable, "-m", "gateway", "train", str(log), "--out", str(out)]
        began_s = time.perf_counter()
        subprocess.run([*command, *(["--embedding"] if embedding else [])], check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - began_s
        size = (out / "arrays.npz").stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "environment": describe(),
        "rows": rows,
        "models": models,
        "embedding": embedding,
        "wall_s": wall_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "artifact_bytes": size,
    }
    print(json.dumps(found) if as_json else found)


def write_log(group: Group, models: tuple[str, ...], rows: int, path: Path) -> int:
    """A log of `rows` requests in random order; returns how many models answered."""
    places = [(row, model) for model in models if model in group.models for row in group.rows_with(model)]
    chosen = np.random.default_rng(0).permutation(len(places))[:rows]
    if len(chosen) < rows:
        raise typer.BadParameter(f"{group.source} has {len(places)} outcomes of these models")
    with path.open("w", encoding="utf-8") as file:
        for number, place in enumerate(chosen):
            row, model = places[place]
            for record in _records(group, row, model, number):
                file.write(record.model_dump_json() + "\n")
    return len({places[place][1] for place in chosen})


def _records(group: Group, row: int, model: str, number: int) -> tuple[RequestRecord, OutcomeRecord]:
    turn = LoggedTurn(role="user", text=f"{number}. {group.prompts[row].text}")
    request = RequestRecord(
        request_id=str(number),
        time=number,
        subset=str(group.subset[row]),
        prompt=LoggedPrompt(kind="full", turns=(turn,)),
        use=LoggedUse(model=model, input_tokens=0, output_tokens=0),
    )
    score = float(group.of(model)[row])
    return request, OutcomeRecord(request_id=str(number), time=number, label="correctness", score=score)


if __name__ == "__main__":
    typer.run(main)
