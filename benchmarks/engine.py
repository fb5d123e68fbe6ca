"""Tokens per second and step time of our engine beside its peers, on a random-weight Qwen3 shape, in one run.

    python -m benchmarks.engine --json

Systems take turns within each round, so that a machine whose speed drifts slows all of them; figures are medians over
rounds. Decoding is greedy and ends at a fixed length.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engine_systems import Outrider, System, Timing, TransformersContinuousBatching, TransformersGenerate
from benchmarks.environment import describe
from benchmarks.random_model import SHAPES, materialize

_console = Console(stderr=True, width=140)
_CACHE = Path.home() / ".cache" / "outrider" / "benchmarks"


def measure(
    systems: list[System], loads: list[tuple[int, int]], num_new: int, rounds: int, vocab: int
) -> list[dict[str, Any]]:
    """A row per system and load (sequences, context in tokens); a first round of each warms up and is dropped."""
    timings: dict[tuple[str, int, int], list[Timing]] = {}
    jobs = [(system, load, turn) for load in loads for turn in range(rounds + 1) for system in systems]
    generator = random.Random(0)
    for system, (sequences, context), turn in track(jobs, console=_console, description="measuring"):
        prompts = [[generator.randrange(vocab) for _ in range(context)] for _ in range(sequences)]
        timing = system.run(prompts, num_new if turn else 4)
        if turn:
            timings.setdefault((system.name, sequences, context), []).append(timing)
    return [_row(*key, runs, num_new) for key, runs in timings.items()]


def _row(system: str, sequences: int, context: int, runs: list[Timing], num_new: int) -> dict[str, Any]:
    decode_s = [run.decode_s for run in runs]
    step_s = statistics.median(decode_s) / (num_new - 1)
    return {
        "system": system,
        "sequences": sequences,
        "context": context,
        "decode_tokens_per_s": round(sequences / step_s, 2),
        "prefill_tokens_per_s": round(sequences * context / statistics.median(run.prefill_s for run in runs), 2),
        "step_ms": round(step_s * 1000, 2),
        "step_ms_range": [round(edge / (num_new - 1) * 1000, 2) for edge in (min(decode_s), max(decode_s))],
        "rounds": len(runs),
    }


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "qwen3-0.5b",
    sequences: Annotated[str, typer.Option(help="concurrent sequences, comma-separated")] = "1,4,16",
    context: Annotated[str, typer.Option(help="prompt tokens, comma-separated")] = "128",
    peers: Annotated[str, typer.Option(help="of transformers, continuous_batching; comma-separated")] = (
        "transformers,continuous_batching"
    ),
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="counted turns of each system")] = 3,
    attention_backend: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Measure decode and prefill throughput."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape} is not one of {', '.join(SHAPES)}")
    known: dict[str, type[TransformersGenerate]] = {
        "transformers": TransformersGenerate,
        "continuous_batching": TransformersContinuousBatching,
    }
    wanted = [peer for peer in peers.split(",") if peer]
    if unknown := set(wanted) - set(known):
        raise typer.BadParameter(f"unknown peers: {', '.join(sorted(unknown))}")
    model = materialize(shape, _CACHE)
    systems: list[System] = [Outrider(model, torch.get_num_threads(), attention_backend)]
    systems += [known[peer](model) for peer in wanted]
    loads = [(int(count), int(length)) for length in context.split(",") for count in sequences.split(",")]
    rows = measure(systems, loads, new_tokens, rounds, SHAPES[shape]["vocab_size"])
    for system in systems:
        system.close()
    _print_table(rows)
    if as_json:
        print(json.dumps({"environment": describe() | {"shape": shape, "new_tokens": new_tokens}, "runs": rows}))


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    _console.print(table)


if __name__ == "__main__":
    typer.run(main)
