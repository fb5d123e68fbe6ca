"""What a decision of `auto` costs a gateway: open loop, at a rate, through the gateway's own chooser.

    python -m benchmarks.router_latency --data FOLDER --rate 100 --json

FOLDER has `prompts.parquet` and `outcomes.parquet`; requests are its prompts, arriving as a Poisson process. The
engines behind are never asked: what is measured is `ModelChooser.choose`, from a parsed request to a model, with the
request log on (its thread shares the interpreter), and beside it how late the event loop wakes up, which is what all
other streams of the process feel. Decisions that the router was too slow for are made without it: `unscored_share`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.environment import describe
from engines.config import EchoEngineConfig
from engines.echo import EchoEngine
from gateway.config import GatewayConfig
from gateway.fleet import Fleet
from gateway.log import make_logger
from gateway.metrics import Metrics
from gateway.model_choice import ModelChooser
from gateway.openai import ChatCompletionRequest
from gateway.process import begin_to_serve
from gateway.request_log import RequestLog
from gateway.router_metrics import RouterMetrics
from gateway.trace import Trace
from router_models import artifact
from router_models.data import read_tables

_TICK_S = 0.001
_WARM_UP = 50
_console = Console(stderr=True, width=120)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds."""

    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        return cls(*map(float, np.quantile(seconds, [0.5, 0.9, 0.99, 1.0])))


@dataclass(frozen=True, slots=True)
class Timed:
    """One decision: seconds from when its request was due, so that a late start counts as well."""

    taken_s: float
    is_scored: bool


def main(
    data: Annotated[Path, typer.Option(help="folder with prompts.parquet and outcomes.parquet")],
    rate: Annotated[float, typer.Option(min=1.0, help="requests per second")] = 100.0,
    num_requests: Annotated[int, typer.Option(min=100)] = 3000,
    router: Annotated[str, typer.Option(help="an artifact's folder, or default")] = "default",
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON at the end")] = False,
) -> None:
    """Measure, and print the quantiles."""
    prompts = _prompts(data, num_requests + _WARM_UP, seed)
    with tempfile.TemporaryDirectory() as folder:
        decisions, lags = asyncio.run(_measure(_config(router, Path(folder)), prompts, rate, seed))
    found = {
        "environment": describe(),
        "artifact": artifact.load(artifact.resolve(router)).manifest.version,
        "rate": rate,
        "requests": num_requests,
        "decision": asdict(Quantiles.of([decision.taken_s for decision in decisions[_WARM_UP:]])),
        "unscored_share": float(np.mean([not decision.is_scored for decision in decisions[_WARM_UP:]])),
        "event_loop_lag": asdict(Quantiles.of(lags)),
    }
    _console.print(found)
    if as_json:
        print(json.dumps(found))


def _config(router: str, folder: Path) -> GatewayConfig:
    prices = {"weak": 1.0, "strong": 10.0}
    candidates = [
        {"model": name, "usd_per_million_input_tokens": price, "usd_per_million_output_tokens": price}
        for name, price in prices.items()
    ]
    models = [{"name": name, "engine": {"kind": "echo", "max_model_len": 2**20}} for name in prices]
    return GatewayConfig.model_validate(
        {
            "models": models,
            "auto": {"candidates": candidates, "artifact": router},
            "request_log": {"folder": str(folder / "log"), "prompt": "full"},
            "log_level": "error",
        }
    )


def _prompts(data: Path, count: int, seed: int) -> list[str]:
    texts = [prompt.text for group in read_tables(data) for prompt in group.prompts]
    return [str(text) for text in np.random.default_rng(seed).choice(np.array(texts, dtype=object), count)]


@contextlib.asynccontextmanager
async def _chooser(config: GatewayConfig, metrics: Metrics) -> AsyncIterator[ModelChooser]:
    engines = {model.name: EchoEngine(EchoEngineConfig(max_model_len=2**20)) for model in config.models}
    log = make_logger("error")
    fleet = Fleet(config, engines)
    fleet.start()
    await fleet.started()
    router_metrics = RouterMetrics(metrics.ingress, metrics.registry)
    assert config.request_log is not None
    request_log = RequestLog(config.request_log, router_metrics, log)
    request_log.start()
    chooser = ModelChooser(config, fleet, router_metrics, log, request_log)
    await chooser.start()
    yield chooser
    await chooser.close()
    await fleet.close()
    await asyncio.to_thread(request_log.close)


async def _measure(
    config: GatewayConfig, prompts: Sequence[str], rate: float, seed: int
) -> tuple[list[Timed], list[float]]:
    """Every decision, in order of arrival, and by how much a sleep of a millisecond was late."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(prompts))
    metrics = Metrics("benchmark")
    lags: list[float] = []
    async with _chooser(config, metrics) as chooser:
        begin_to_serve()
        watcher = asyncio.create_task(_watch(lags))
        tasks, due_s = [], time.perf_counter()
        for number, (text, gap) in enumerate(zip(prompts, gaps, strict=True)):
            due_s += gap
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_decide(chooser, metrics, text, number, due_s)))
        decisions = await asyncio.gather(*tasks)
        watcher.cancel()
    return decisions, lags


async def _decide(chooser: ModelChooser, metrics: Metrics, text: str, number: int, due_s: float) -> Timed:
    messages = ({"role": "user", "content": text},)
    request = ChatCompletionRequest.model_validate({"model": "auto", "messages": messages, "max_tokens": 256})
    trace = Trace(metrics, make_logger("error"), str(number))
    await chooser.choose(request, trace)
    taken_s = time.perf_counter() - due_s
    trace.finish(200)
    section = trace.receipt.body()["model"]
    assert isinstance(section, dict)
    return Timed(taken_s, section["novelty"] is not None)


async def _watch(lags: list[float]) -> None:
    while True:
        began_s = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        lags.append(time.perf_counter() - began_s - _TICK_S)


if __name__ == "__main__":
    typer.run(main)
