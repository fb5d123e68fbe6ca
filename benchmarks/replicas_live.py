"""Two real replicas of the demo's target under agent sessions: ours beside Serve's two choices and round robin.

    python -m benchmarks.replicas_live --trace agent_sessions.jsonl.gz --sessions 24 --concurrency 8

Each policy gets a gateway of its own (`outrider serve` with configs/replicas.yaml's model), the same sessions in the
same order, `concurrency` of them at a time; a session's next call follows the answer to its last. Cached share: prompt
tokens that the engines found computed, of all, by the engines' own counters. TTFT: from sending to the first event.
The KV cache is small enough (--kv-mb) that one replica cannot hold all sessions, and two can if each is kept on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml

from benchmarks.agent_sessions import Call, Cut, read_sessions
from benchmarks.environment import describe

_ROOT = Path(__file__).resolve().parent.parent
_MODEL = "outrider-demo"
_START_S = 240.0
_COUNTERS = ("num_prompt_tokens", "num_cached_tokens", "num_steps")
POLICIES = ("round_robin", "two_choices", "warm")


@contextlib.contextmanager
def serving(policy: str, kv_bytes: int, replicas: int) -> Iterator[str]:
    """A gateway with this policy, up and ready; its address. Raises RuntimeError if it does not come up."""
    document = yaml.safe_load((_ROOT / "configs" / "replicas.yaml").read_text())
    args = document["applications"][0]["args"]
    args["routing"] = {"policy": policy}
    args["log_level"] = "error"
    model = args["models"][0]
    model["num_replicas"] = replicas
    # Plain decoding: what is compared is where a prompt goes.
    model["engine"] |= {"kv_cache_bytes": kv_bytes, "drafter": {"kind": "none"}, "costs_file": ""}
    model["actor"]["num_cpus"] = args["ingress"]["actor"]["num_cpus"] = 0.1
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output.txt").open("w+") as log:
        config = Path(folder) / "fleet.yaml"
        config.write_text(yaml.safe_dump(document))
        port = _free_port()
        command = [sys.executable, "-m", "gateway", "serve", str(config), "--port", str(port)]
        process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        except TimeoutError as error:
            log.seek(0)
            raise RuntimeError(f"the gateway did not start:\n{log.read()}") from error
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        time.sleep(0.5)
    raise TimeoutError


async def run_sessions(url: str, sessions: Sequence[Sequence[Call]], concurrency: int) -> list[float]:
    """TTFT of every call, in seconds. Raises httpx.HTTPStatusError for a call that is refused."""
    waiting = list(reversed(sessions))
    found: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def work() -> None:
            while waiting:
                for call in waiting.pop():
                    found.append(await _ttft_s(http, call))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    return found


async def _ttft_s(http: httpx.AsyncClient, call: Call) -> float:
    body = {"model": _MODEL, "prompt": call.prompt, "max_tokens": call.output_tokens, "ignore_eos": True, "seed": 0}
    began = time.perf_counter()
    first: float | None = None
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for part in answer.aiter_raw():
            if first is None:
                first = time.perf_counter() - began
            if b'"error"' in part:
                raise RuntimeError(f"a stream broke: {part.decode()}")
    assert first is not None
    return first


def counters(url: str) -> dict[str, float]:
    """The engines' counters over all replicas, and the gateway's share of local decisions, where it decides."""
    wanted = {f'outrider_engine_{name}{{model="{_MODEL}"}}': name for name in _COUNTERS}
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        series, _, value = line.rpartition(" ")
        if series in wanted:
            found[wanted[series]] = float(value)
        elif series.startswith("outrider_replica_fallback_share{"):
            found["fallback_share"] = float(value)
    return found


def measure(policy: str, sessions: Sequence[Sequence[Call]], concurrency: int, kv_bytes: int, replicas: int) -> Any:
    """One run on a fresh fleet. Raises RuntimeError."""
    with serving(policy, kv_bytes, replicas) as url:
        # Compile, connect, fill pools: with prompts that no session has.
        warm_up = [[Call(tuple(random.Random(seed).choices(range(300, 8000), k=200)), 4)] for seed in range(8)]
        asyncio.run(run_sessions(url, warm_up, 4))
        before = counters(url)
        began = time.perf_counter()
        ttft_s = asyncio.run(run_sessions(url, sessions, concurrency))
        elapsed_s = time.perf_counter() - began
        after = counters(url)
    prompt_tokens, cached_tokens = (after[name] - before[name] for name in _COUNTERS[:2])
    cuts = statistics.quantiles(ttft_s, n=100, method="inclusive")
    return {
        "policy": "outrider" if policy == "warm" else policy,
        "calls": len(ttft_s),
        "prompt_tokens": int(prompt_tokens),
        "cached_tokens": int(cached_tokens),
        "cached_share": round(cached_tokens / prompt_tokens, 4),
        "ttft_p50_s": round(cuts[49], 4),
        "ttft_p90_s": round(cuts[89], 4),
        "ttft_p99_s": round(cuts[98], 4),
        "ttft_mean_s": round(statistics.fmean(ttft_s), 4),
        "seconds": round(elapsed_s, 2),
        "fallback_share": after.get("fallback_share"),
    }


def main(
    trace: Annotated[Path, typer.Option(help="agent sessions, one JSON object with `messages` a line")],
    sessions: Annotated[int, typer.Option(min=1, help="the first so many")] = 24,
    concurrency: Annotated[int, typer.Option(min=1, help="sessions at a time")] = 8,
    kv_mb: Annotated[int, typer.Option(min=1, help="KV cache of a replica, MiB")] = 48,
    replicas: Annotated[int, typer.Option(min=2)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="rounds over the policies")] = 1,
    policies: Annotated[str, typer.Option(help="comma separated")] = ",".join(POLICIES),
) -> None:
    """Measure; the last line of output is one JSON document."""
    from engines.tokenizer import Tokenizer

    cut = Cut()
    tokenizer = Tokenizer.load(str(_ROOT / "demo" / "models" / "target"))
    chosen = read_sessions(trace, tokenizer.encode, cut)[:sessions]
    runs = []
    for _ in range(repeats):
        for policy in policies.split(","):
            runs.append(measure(policy, chosen, concurrency, kv_mb * 2**20, replicas))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    setup = {
        "trace": trace.name,
        "sessions": len(chosen),
        "calls": sum(map(len, chosen)),
        "mean_prompt_tokens": round(statistics.fmean(len(call.prompt) for each in chosen for call in each), 1),
        "concurrency": concurrency,
        "kv_cache_mib": kv_mb,
        "replicas": replicas,
        "cut": {"context": cut.context, "system": cut.system, "message": cut.message, "output": cut.output},
    }
    print(json.dumps({"benchmark": "replicas_live", "environment": describe(), "setup": setup, "runs": runs}))


if __name__ == "__main__":
    typer.run(main)
