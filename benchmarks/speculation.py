"""Decoded tokens per second with and without speculation: every drafter, every fixed length, and the adaptive one.

    python -m benchmarks.speculation --json
    python -m benchmarks.speculation --quick --json

The target is the demo target upscaled to half a billion parameters (`benchmarks.upscale`): the acceptance of a real
pair, at the cost of a real model. Within a group (workload, temperature, sequences) the settings take turns
(`benchmarks.turns`); figures are medians over passes, ratios the medians of the passes' own. Every setting emits the
same tokens, since the output does not depend on the drafts, so that within a group only speed differs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks import upscale
from benchmarks.environment import describe, describe_llama_cpp, llama_cpp_missing
from benchmarks.speculation_picture import draw
from benchmarks.speculation_systems import Length, Outrider, Peer, Setting, assistants
from benchmarks.turns import MANY_SEQUENCES, Job, Runs, speed, take_turns
from benchmarks.workloads import WORKLOADS, Prompt, Workload, prompts
from engines.types import DrafterChoice

Name = TypeVar("Name", bound=str)
_console = Console(stderr=True, width=140)
_DRAFT = Path(__file__).resolve().parent.parent / "demo" / "models" / "draft"
_PEERS = ("transformers", "llama.cpp")
_DRAFTERS: tuple[DrafterChoice, ...] = ("ngram", "suffix", "model", "auto")
_LENGTHS: tuple[Length, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
# With one sequence a single prompt would say little: so many are decoded one after another.
_MIN_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: the cross product of the fields, `rounds` times over."""

    workloads: tuple[Workload, ...]
    temperatures: tuple[float, ...]
    sequences: tuple[int, ...]
    drafters: tuple[DrafterChoice, ...]
    lengths: tuple[Length, ...]
    tokens: int
    rounds: int

    def tokens_for(self, sequences: int) -> int:
        """New tokens of each sequence."""
        return self.tokens if sequences < MANY_SEQUENCES else max(1, self.tokens * 2 // 3)

    def settings(self, workload: Workload, temperature: float) -> list[Setting]:
        """Plain decoding, then each drafter at each fixed length and adaptive."""
        drafters = list(self.drafters)
        if workload == "edit" and "auto" in drafters:
            drafters.append("prediction")
        drafted = [
            Setting(drafter, length, temperature) for drafter in drafters for length in (*self.lengths, "adaptive")
        ]
        return [Setting("none", 0, temperature), *drafted]

    def groups(self) -> Iterator[tuple[Workload, float, int]]:
        """Workload, temperature and sequences of each group."""
        for workload in self.workloads:
            for temperature in self.temperatures:
                for sequences in self.sequences:
                    yield workload, temperature, sequences


QUICK = Plan(("code",), (0.0,), (1, 16), ("ngram", "model", "auto"), (2, 4, 8), tokens=20, rounds=1)
FULL = Plan(WORKLOADS, (0.0, 1.0), (1, 4, 16, 32), _DRAFTERS, _LENGTHS, tokens=24, rounds=1)


def measure(
    plan: Plan, ours: Outrider, peers: Sequence[Peer], chosen: dict[Workload, tuple[Prompt, ...]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one group after another; peers decode one sequence at a time, and are measured where we do."""
    for workload, temperature, sequences in track(list(plan.groups()), console=_console, description="measuring"):
        batches = _batches(chosen[workload], sequences)
        num_new = plan.tokens_for(sequences)
        jobs = [_own(ours, setting, num_new) for setting in plan.settings(workload, temperature)]
        for batch in batches:
            ours.run(batch, Setting("none", 0, temperature), 2)  # fills the prefix cache
        if sequences == 1:
            for peer in peers:
                peer.run(batches[0], temperature, 2)  # warms up
            jobs += [_peer(peer, temperature, num_new) for peer in peers]
        runs = take_turns(jobs, batches, plan.rounds)
        group = {"workload": workload, "temperature": temperature, "sequences": sequences}
        yield [_row(job, group, runs[number]) for number, job in enumerate(jobs)]


def _own(ours: Outrider, setting: Setting, num_new: int) -> Job:
    return Job("outrider", setting.drafter, setting.length, lambda batch: ours.run(batch, setting, num_new))


def _peer(peer: Peer, temperature: float, num_new: int) -> Job:
    return Job(peer.name, peer.drafter, peer.length, lambda batch: peer.run(batch, temperature, num_new))


def _batches(chosen: tuple[Prompt, ...], sequences: int) -> list[tuple[Prompt, ...]]:
    count = max(sequences, _MIN_PROMPTS)
    return [chosen[start : start + sequences] for start in range(0, count, sequences)]


def _row(job: Job, group: dict[str, Any], runs: Runs) -> dict[str, Any]:
    rates = {number: speed(measured) for number, measured in runs.items()}
    everything = [one for measured in runs.values() for one in measured]
    drafted = sum(one.num_drafted for one in everything)
    steps = sum(one.num_steps * one.num_sequences for one in everything)
    return {
        "system": job.system,
        **group,
        "drafter": job.drafter,
        "draft_length": job.length,
        "tokens_per_s": round(statistics.median(rates.values()), 2),
        "tokens_per_s_by_pass": {str(number): round(rate, 2) for number, rate in rates.items()},
        "tokens_per_step": round(sum(one.num_tokens for one in everything) / steps, 3) if steps else None,
        "acceptance_rate": round(sum(one.num_accepted for one in everything) / drafted, 3) if drafted else None,
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each group: adaptive beside plain and beside the best fixed length, by drafter, and beside the peers.

    The best fixed length is the fastest of those that were not weeded out.
    """
    found = []
    keys = {(row["workload"], row["temperature"], row["sequences"]) for row in rows}
    for key in sorted(keys):
        group = [row for row in rows if (row["workload"], row["temperature"], row["sequences"]) == key]
        own = [row for row in group if row["system"] == "outrider"]
        plain = next(row for row in own if row["drafter"] == "none")
        for row in own:
            if row["draft_length"] != "adaptive":
                continue
            fixed = [one for one in own if one["drafter"] == row["drafter"] and one["draft_length"] != "adaptive"]
            most = max((len(one["tokens_per_s_by_pass"]) for one in fixed), default=0)
            left = [one for one in fixed if len(one["tokens_per_s_by_pass"]) == most]
            peers: dict[str, float] = {}  # each at its fastest setting
            for one in group:
                if one["system"] != "outrider":
                    peers[one["system"]] = min(peers.get(one["system"], math.inf), _ratio(row, one))
            found.append(
                {
                    "workload": key[0],
                    "temperature": key[1],
                    "sequences": key[2],
                    "drafter": row["drafter"],
                    "adaptive_over_plain": round(_ratio(row, plain), 3),
                    "adaptive_over_best_fixed": round(min(_ratio(row, one) for one in left), 3) if left else None,
                    "adaptive_over_best_peer": round(min(peers.values()), 3) if peers else None,
                    "adaptive_over_peers": {peer: round(ratio, 3) for peer, ratio in peers.items()},
                }
            )
    return found


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    """How much faster: the median over the passes that both took part in."""
    ours, theirs = row["tokens_per_s_by_pass"], other["tokens_per_s_by_pass"]
    ratios: list[float] = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
    return statistics.median(ratios)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="code at temperature 0, 1 and 16 sequences")] = False,
    workloads: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "",
    sequences: Annotated[str, typer.Option(help="comma-separated")] = "",
    drafters: Annotated[str, typer.Option(help="comma-separated")] = "",
    lengths: Annotated[str, typer.Option(help="fixed draft lengths, comma-separated; 'none' for adaptive alone")] = "",
    tokens: Annotated[int, typer.Option(help="new tokens for each sequence; 0: the plan's own")] = 0,
    rounds: Annotated[int, typer.Option(help="0: the plan's own")] = 0,
    peers: Annotated[
        str, typer.Option(help=f"of {', '.join(_PEERS)}, at 1 sequence; comma-separated")
    ] = "transformers",
    cold: Annotated[
        bool, typer.Option("--cold", help="each of our runs starts without learnt costs and rates")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="write the document there after each group")] = None,
    picture: Annotated[Path | None, typer.Option(help="write a PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Measure speculative decoding."""
    wanted = _named(peers, _PEERS)
    if "llama.cpp" in wanted and (missing := llama_cpp_missing()):
        raise typer.BadParameter(missing)
    base = QUICK if quick else FULL
    plan = Plan(
        workloads=tuple(_named(workloads, WORKLOADS)) or base.workloads,
        temperatures=tuple(map(float, _items(temperatures))) or base.temperatures,
        sequences=tuple(map(int, _items(sequences))) or base.sequences,
        drafters=tuple(_named(drafters, (*_DRAFTERS, "prediction"))) or base.drafters,
        lengths=() if lengths == "none" else tuple(map(int, _items(lengths))) or base.lengths,
        tokens=tokens or base.tokens,
        rounds=rounds or base.rounds,
    )
    target = upscale.materialize()
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    count = max(*plan.sequences, _MIN_PROMPTS)
    chosen = {workload: prompts(workload, tokenizer, count) for workload in plan.workloads}
    ours = Outrider(target, _DRAFT, torch.get_num_threads(), max(plan.sequences), is_cold=cold)
    rows: list[dict[str, Any]] = []
    environment = describe() | {"tokens": plan.tokens, "rounds": plan.rounds, "cold": cold}
    if "llama.cpp" in wanted:
        environment |= describe_llama_cpp()
    for group in measure(plan, ours, _load_peers(wanted, target), chosen):
        rows += group
        document = {"environment": environment, "runs": rows, "claims": claims(rows)}
        if save is not None:
            save.write_text(json.dumps(document, indent=1) + "\n")
    _print_table(claims(rows))
    if picture is not None:
        draw(rows, picture)
    if as_json:
        print(json.dumps({"environment": environment, "runs": rows, "claims": claims(rows)}))


def _load_peers(wanted: Sequence[str], target: Path) -> list[Peer]:
    loaded: list[Peer] = list(assistants(target, _DRAFT)) if "transformers" in wanted else []
    if "llama.cpp" in wanted:
        from benchmarks import speculation_llama_cpp

        loaded += speculation_llama_cpp.systems(target, _DRAFT)
    return loaded


def _named(text: str, known: Sequence[Name]) -> list[Name]:
    if unknown := set(_items(text)) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not of {', '.join(known)}")
    return [name for name in known if name in _items(text)]


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    _console.print(table)


if __name__ == "__main__":
    typer.run(main)
