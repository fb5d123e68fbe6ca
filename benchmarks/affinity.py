"""Who should get a request: every policy on one trace, at three loads, against simulated replicas.

    python -m benchmarks.affinity --trace FILE --replicas 8 --blocks 2500 --json

Each policy sees the same arrivals. Block hit rate: blocks found in the replica's cache when the prompt's turn came, of
all blocks. Skew: prefilled tokens of the busiest replica over the mean. TTFT in simulated seconds (`affinity_fleet`
says how). Ours runs through the gateway's own code and a real Redis (`affinity_outrider` says how time is kept).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.affinity_fleet import Clock, Result, Simulation
from benchmarks.affinity_outrider import Outrider
from benchmarks.affinity_policies import BASELINES
from benchmarks.affinity_traces import TraceRequest, read_trace
from benchmarks.environment import describe
from gateway.routing.replica_choice import DEFAULT_WEIGHTS, ChoiceWeights
from gateway.state.embedded import EmbeddedServer

OURS = "outrider"
POLICIES = (*BASELINES, OURS)
LOADS = (0.5, 0.7, 0.9)
_console = Console(stderr=True, width=140)


def run_policy(
    policy: str,
    trace: Sequence[TraceRequest],
    load: float,
    *,
    replicas: int,
    blocks: int,
    seed: int = 0,
    gateways: int = 1,
    url: str | None = None,
    weights: ChoiceWeights = DEFAULT_WEIGHTS,
) -> Result:
    """One row. `url` is the Redis of ours. Raises RuntimeError if ours had to decide without it."""
    if policy in BASELINES:
        simulation = Simulation(trace, replicas, blocks, load)
        return asyncio.run(simulation.run(BASELINES[policy](replicas, random.Random(seed))))
    assert url is not None, "ours needs a Redis"
    return asyncio.run(_run_ours(trace, load, replicas, blocks, seed, gateways, url, weights))


async def _run_ours(
    trace: Sequence[TraceRequest],
    load: float,
    replicas: int,
    blocks: int,
    seed: int,
    gateways: int,
    url: str,
    weights: ChoiceWeights,
) -> Result:
    clock = Clock(now_s=1e6)
    policy = Outrider(
        url, f"replay-{time.time_ns()}", replicas, clock, num_gateways=gateways, weights=weights, seed=seed
    )
    try:
        await policy.start()
        result = await Simulation(trace, replicas, blocks, load, clock=clock, at_once=gateways).run(policy)
        if policy.fallbacks:
            raise RuntimeError(f"{policy.fallbacks} calls to Redis failed: the figures would not be ours")
        return result
    finally:
        await policy.close()


def rows(
    trace: Sequence[TraceRequest],
    policies: Sequence[str],
    loads: Sequence[float],
    *,
    replicas: int,
    blocks: int,
    seed: int,
    gateways: int,
    url: str | None,
) -> Iterator[dict[str, Any]]:
    """All runs, as the JSON document has them."""
    for load in loads:
        for policy in policies:
            result = run_policy(
                policy, trace, load, replicas=replicas, blocks=blocks, seed=seed, gateways=gateways, url=url
            )
            yield {
                "policy": policy,
                "load": load,
                "block_hit_rate": round(result.block_hit_rate, 4),
                "skew": round(result.skew, 4),
                "ttft_p50_s": round(result.ttft_p50_s, 4),
                "ttft_p99_s": round(result.ttft_p99_s, 4),
                "rejected": result.rejected,
            }


def _known(policies: str | None) -> tuple[str, ...]:
    chosen = POLICIES if policies is None else tuple(name.strip() for name in policies.split(",") if name.strip())
    unknown = [name for name in chosen if name not in POLICIES]
    if unknown or not chosen:
        raise typer.BadParameter(f"{', '.join(unknown) or 'none'}: choose from {', '.join(POLICIES)}")
    return chosen


def _loads(text: str) -> tuple[float, ...]:
    try:
        loads = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: numbers separated by commas") from error
    if not all(0 < load <= 10 for load in loads):
        raise typer.BadParameter(f"{text}: each load must be above 0 and at most 10")
    return loads


def _print(runs: Sequence[dict[str, Any]]) -> None:
    for load in sorted({run["load"] for run in runs}):
        table = Table(title=f"load {load:g}", title_justify="left")
        for column in ("policy", "block hits", "skew", "TTFT p50 s", "TTFT p99 s", "rejected"):
            table.add_column(column, justify="left" if column == "policy" else "right")
        for run in (run for run in runs if run["load"] == load):
            figures = [f"{run[key]:.3f}" for key in ("block_hit_rate", "skew", "ttft_p50_s", "ttft_p99_s")]
            table.add_row(run["policy"], *figures, str(run["rejected"]))
        _console.print(table)


def main(
    trace: Annotated[Path, typer.Option(help="request log: .jsonl with hash_ids, or .csv; .gz or not", exists=True)],
    replicas: Annotated[int, typer.Option(min=1, max=4096)] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="of cache in each replica")] = 2500,
    policies: Annotated[str | None, typer.Option(help="comma separated; default: all")] = None,
    loads: Annotated[str, typer.Option(help="shares of the fleet's time, nothing cached")] = "0.5,0.7,0.9",
    gateways: Annotated[int, typer.Option(min=1, max=64, help="that share the requests, for ours")] = 1,
    limit: Annotated[int, typer.Option(min=0, help="first requests only; 0: all")] = 0,
    seed: int = 0,
    redis: Annotated[str | None, typer.Option(help="URL; default: an embedded server")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="last line of stdout: one JSON document")] = False,
) -> None:
    """Replay TRACE under every policy."""
    chosen, levels = _known(policies), _loads(loads)
    try:
        requests = read_trace(trace)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from error
    requests = requests[:limit] if limit else requests
    server = EmbeddedServer() if OURS in chosen and redis is None else None
    try:
        url = redis if server is None else server.url
        runs = list(
            rows(requests, chosen, levels, replicas=replicas, blocks=blocks, seed=seed, gateways=gateways, url=url)
        )
    finally:
        if server is not None:
            server.stop()
    _print(runs)
    if as_json:
        setting = {"trace": trace.name, "requests": len(requests), "replicas": replicas, "blocks": blocks}
        document = {**setting, "gateways": gateways, "seed": seed, "environment": describe(), "runs": runs}
        print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
