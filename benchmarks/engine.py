"""Tokens per second and step time of our engine beside its peers, on a random-weight Qwen3 shape, in one run.

    python -m benchmarks.engine --json
    python -m benchmarks.engine --peers transformers,llama.cpp --json
    python -m benchmarks.engine --peers int8,int4 --loads 1x128 --json    our own engine, quantized

Systems take turns within each round, so that a machine whose speed drifts slows all of them; figures are medians over
rounds, and a ratio is the median of the ratios within each round. Decoding is greedy and ends at a fixed length.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engine_systems import Outrider, System, Timing, TransformersContinuousBatching, TransformersGenerate
from benchmarks.environment import describe, describe_llama_cpp, llama_cpp_missing
from benchmarks.random_model import SHAPES, materialize

_console = Console(stderr=True, width=140)
_CACHE = Path.home() / ".cache" / "outrider" / "benchmarks"


Load = tuple[int, int]  # sequences, and the tokens of each one's prompt
Timings = dict[Load, dict[str, list[Timing]]]  # by load and system, in the order of rounds
_LOADS = "1x128,4x128,16x128,16x512"
_QUANTIZED = ("int8", "int4")
_PEERS = ("transformers", "continuous_batching", "llama.cpp", *_QUANTIZED)


def measure(
    systems: Sequence[System], loads: Sequence[Load], num_new: int, rounds: int, vocab: int
) -> Iterator[Timings]:
    """Timings of one load after another, of every round but the first, which warms up each system.

    Systems go in opposite order in every other round, so that none always runs on a machine that another has heated.
    """
    generator = random.Random(0)
    jobs = [(turn, system) for turn in range(rounds + 1) for system in systems[:: (-1) ** turn]]
    for sequences, context in loads:
        timings: dict[str, list[Timing]] = {system.name: [] for system in systems}
        for turn, system in track(jobs, console=_console, description=f"measuring {sequences}x{context}"):
            prompts = [[generator.randrange(vocab) for _ in range(context)] for _ in range(sequences)]
            timing = system.run(prompts, num_new if turn else 4)
            if turn:
                timings[system.name].append(timing)
        yield {(sequences, context): timings}


def rows(timings: Timings, num_new: int) -> list[dict[str, Any]]:
    """A row per load and system: medians over rounds."""
    return [_row(system, load, runs, num_new) for load, by in timings.items() for system, runs in by.items()]


def ratios(timings: Timings) -> list[dict[str, Any]]:
    """A row per load and peer: our throughput over the peer's, the median of the rounds' own ratios."""
    found = []
    for (sequences, context), by_system in timings.items():
        ours = by_system["outrider"]
        for peer, theirs in by_system.items():
            if peer == "outrider":
                continue
            both = list(zip(ours, theirs, strict=True))
            found.append(
                {
                    "peer": peer,
                    "sequences": sequences,
                    "context": context,
                    "decode": round(statistics.median(peers.decode_s / own.decode_s for own, peers in both), 3),
                    "prefill": round(statistics.median(peers.prefill_s / own.prefill_s for own, peers in both), 3),
                }
            )
    return found


def _row(system: str, load: Load, runs: list[Timing], num_new: int) -> dict[str, Any]:
    sequences, context = load
    decode_s = [run.decode_s for run in runs]
    step_s = statistics.median(decode_s) / (num_new - 1)
    return {
        "system": system,
        "sequences": sequences,
        "context": context,
        "decode_tokens_per_s": round(sequences / step_s, 2),
        "prefill_tokens_per_s": round(sequences * context / statistics.median(run.prefill_s for run in runs), 2),
        "step_ms": round(step_s * 1000, 4),  # tiny models have steps of microseconds
        "step_ms_range": [round(edge / (num_new - 1) * 1000, 2) for edge in (min(decode_s), max(decode_s))],
        "rounds": len(runs),
    }


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "qwen3-0.5b",
    loads: Annotated[str, typer.Option(help="sequences x tokens of each prompt, comma-separated")] = _LOADS,
    sequences: Annotated[str, typer.Option(help="in place of the loads: these, at each context")] = "",
    context: Annotated[str, typer.Option(help="in place of the loads: these, at 1, 4 and 16 sequences")] = "",
    peers: Annotated[str, typer.Option(help=f"of {', '.join(_PEERS)}; comma-separated")] = (
        "transformers,continuous_batching"
    ),
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="counted turns of each system")] = 3,
    attention_backend: str = "auto",
    save: Annotated[Path | None, typer.Option(help="write the document there after each load")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Measure decode and prefill throughput."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape} is not one of {', '.join(SHAPES)}")
    wanted = _peers(peers)
    chosen = _loads(loads, sequences, context)
    model = materialize(shape, _CACHE)
    systems: list[System] = [Outrider(model, torch.get_num_threads(), attention_backend)]
    systems += [_system(peer, model) for peer in wanted]
    environment = describe() | {"shape": shape, "new_tokens": new_tokens}
    if "llama.cpp" in wanted:
        environment |= describe_llama_cpp()
    timings: Timings = {}
    for measured in measure(systems, chosen, new_tokens, rounds, SHAPES[shape]["vocab_size"]):
        timings |= measured
        tables = {"runs": rows(timings, new_tokens), "ratios": ratios(timings)}
        document = {"environment": environment, **tables}
        if save is not None:
            save.write_text(json.dumps(document, indent=1) + "\n")
    for system in systems:
        system.close()
    for table in tables.values():
        _print_table(table)
    if as_json:
        print(json.dumps(document))


def _loads(text: str, sequences: str, context: str) -> list[Load]:
    if sequences or context:
        counts, lengths = _numbers(sequences or "1,4,16"), _numbers(context or "128")
        return [(count, length) for length in lengths for count in counts]
    pairs = [_numbers(load, "x") for load in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise typer.BadParameter(f"{text}: a load reads like 16x128")
    return [(count, length) for count, length in pairs]


def _numbers(text: str, separator: str = ",") -> list[int]:
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError as error:
        raise typer.BadParameter(f"{text}: whole numbers are wanted") from error
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text}: numbers from 1 on are wanted")
    return numbers


def _peers(text: str) -> list[str]:
    """The peers named; refused, before anything is loaded, if one is unknown or not installed."""
    wanted = list(dict.fromkeys(peer for peer in text.split(",") if peer))
    if unknown := set(wanted) - set(_PEERS):
        raise typer.BadParameter(f"unknown peers: {', '.join(sorted(unknown))}")
    if "llama.cpp" in wanted and (missing := llama_cpp_missing()):
        raise typer.BadParameter(missing)
    return wanted


def _system(peer: str, model: Path) -> System:
    if peer == "llama.cpp":
        from benchmarks.engine_llama_cpp import LlamaCpp

        return LlamaCpp(model)
    if peer in _QUANTIZED:
        return Outrider(model, torch.get_num_threads(), quantization=peer)
    return TransformersGenerate(model) if peer == "transformers" else TransformersContinuousBatching(model)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    _console.print(table)


if __name__ == "__main__":
    typer.run(main)
