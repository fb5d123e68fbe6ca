"""The replay on tiny traces made here: formats, caches, queues, every policy, ours through a real Redis."""

import asyncio
import gzip
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import affinity
from benchmarks.affinity import POLICIES, run_policy
from benchmarks.affinity_cost import Load, OthersUse, block_hashes, measure, medians
from benchmarks.affinity_fleet import Arrival, LruCache, Result, Simulation, Speed
from benchmarks.affinity_policies import BASELINES, RoutedPrefixes
from benchmarks.affinity_traces import BLOCK_SIZE, TraceRequest, read_trace
from gateway.state.config import StateConfig
from gateway.state.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with EmbeddedServer(max_memory_mb=32) as server:
        yield server.url


def conversations(num: int = 12, turns: int = 6, seed: int = 0) -> list[TraceRequest]:
    """Sessions that share their first block and grow by two blocks a turn, interleaved."""
    rng = random.Random(seed)
    requests = []
    for session in range(num):
        at = rng.uniform(0, 20)
        blocks: tuple[int, ...] = (0,)
        for turn in range(turns):
            blocks += tuple(1000 * session + 2 * turn + each + 1 for each in range(2))
            requests.append(TraceRequest(at, len(blocks) * BLOCK_SIZE - rng.randint(0, 99), 20, blocks))
            at += rng.uniform(3, 8)
    return sorted(requests, key=lambda each: each.at_s)


def test_both_formats_are_read_plain_and_gzipped(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 2500, "input_length": 600, "output_length": 7, "hash_ids": [0, 5]},
        {"timestamp": 500, "input_length": 512, "output_length": 3, "hash_ids": [0]},
    ]
    hashed = tmp_path / "a.jsonl.gz"
    hashed.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_trace(hashed) == [TraceRequest(0.0, 512, 3, (0,)), TraceRequest(2.0, 600, 7, (0, 5))]
    plain = tmp_path / "b.csv"
    plain.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,513,10\n2023-11-16 18:17:05.9799600,5,1\n"
    )
    assert read_trace(plain) == [TraceRequest(0.0, 513, 10, (0, 1)), TraceRequest(2.0, 5, 1, (2,))]


def test_sessions_of_agents_are_calls_that_share_what_was_said(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s" * 5000}
    turns = [{"role": role, "content": role * 600} for role in ("user", "assistant", "tool", "assistant")]
    path = tmp_path / "sessions.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [system, *turns, {"role": "user"}]}) for _ in range(2)))
    first, other_first, second, other_second = sorted(read_trace(path), key=lambda each: each.prompt_tokens)
    assert second.prompt_tokens > first.prompt_tokens > 5000 / 4
    shared = first.prompt_tokens // BLOCK_SIZE  # whole blocks
    assert first.blocks[:shared] == second.blocks[:shared]
    assert first.blocks[-1] not in second.blocks
    assert second.at_s - first.at_s == pytest.approx(2 + 0.04 * first.output_tokens)
    assert (other_first.blocks, other_second.blocks) == (first.blocks, second.blocks)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.txt", "", "ends in"),
        ("x.jsonl", "{}", "not a trace"),
        ("x.csv", "A,B\n1,2\n", "not a trace"),
        ("y.csv", "A\n", "no requests"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trace(tmp_path / name)


def test_the_cache_keeps_the_last_used_and_of_a_prompt_its_beginning() -> None:
    cache = LruCache(4)
    assert cache.insert([1, 2, 3]) == ([1, 2, 3], [])
    assert cache.insert([1, 9]) == ([9], [])
    assert cache.insert([1, 8]) == ([8], [3])
    assert (cache.match([1, 2, 3]), cache.match([1, 9]), cache.match([2, 1, 5])) == (2, 2, 2)
    added, removed = cache.insert([11, 12, 13, 14, 15, 16])
    assert (sorted(added), sorted(removed)) == ([11, 12, 13, 14], [1, 2, 8, 9])


class _Always:
    """Everything to one replica; None rejects."""

    def __init__(self, replica: int | None) -> None:
        self.replica = replica
        self.ended: list[int] = []

    async def choose(self, arrivals: Sequence[Arrival]) -> Sequence[int | None]:
        return [self.replica for _ in arrivals]

    async def prefilled(self, arrival: Arrival, added: Sequence[int], removed: Sequence[int]) -> None:
        assert arrival.number not in self.ended

    async def finished(self, arrival: Arrival) -> None:
        self.ended.append(arrival.number)

    async def tick(self) -> None:
        pass


def simulate(trace: Sequence[TraceRequest], policy: _Always, speed: Speed, load: float = 0.5) -> Result:
    return asyncio.run(Simulation(trace, 2, 100, load, speed=speed).run(policy))


def test_ttft_is_wait_and_uncached_tokens_over_the_rate() -> None:
    speed = Speed(prefill_rate=1000.0, overhead_s=0.5, decode_step_s=1e9)
    trace = [TraceRequest(0.0, 1024, 0, (1, 2)), TraceRequest(1e-6, 1024, 0, (1, 3))]
    policy = _Always(1)
    result = simulate(trace, policy, speed, load=1e6)  # both at once
    assert result.ttft_p50_s == pytest.approx(0.5 + 1.024, abs=1e-3)
    assert result.ttft_p99_s == pytest.approx(2 * 0.5 + 1.024 + 0.512, abs=1e-3)
    assert (result.block_hit_rate, result.skew, result.rejected) == (0.25, 2.0, 0)
    assert sorted(policy.ended) == [0, 1]


def test_a_full_replica_rejects_and_a_policy_may() -> None:
    trace = [TraceRequest(number * 1e-6, 512, 1, (number,)) for number in range(5)]
    full = _Always(0)
    assert simulate(trace, full, Speed(max_requests=3), load=1e6).rejected == 2
    assert sorted(full.ended) == list(range(5))
    assert simulate(trace, _Always(None), Speed()).rejected == 5


def test_load_moves_arrivals_together() -> None:
    trace = [TraceRequest(float(number), 1000, 0, (number,)) for number in range(50)]
    calm, busy = (simulate(trace, _Always(0), Speed(), load=load) for load in (0.1, 2.0))
    assert calm.ttft_p99_s < busy.ttft_p99_s / 5


def test_routed_prefixes_forget_by_size() -> None:
    routed = RoutedPrefixes(2, capacity=3)
    routed.insert(0, [1, 2, 3])
    routed.insert(1, [1, 9])
    assert routed.longest([1, 2, 3, 4]) == (3, [0])
    assert routed.longest([1, 7]) == (1, [0, 1])
    routed.insert(0, [5, 6])
    assert routed.longest([1, 2]) == (1, [0, 1])


@pytest.mark.parametrize("policy", BASELINES)
def test_baselines_serve_everything_and_release_their_loads(policy: str) -> None:
    trace = conversations()
    baseline = BASELINES[policy](4, random.Random(0))
    result = asyncio.run(Simulation(trace, 4, 200, 0.5).run(baseline))
    assert (result.rejected, sum(baseline.requests), sum(baseline.queued)) == (0, 0, 0)
    assert 0 <= result.block_hit_rate < 1
    assert 1 <= result.skew <= 4


def test_rules_do_what_they_are_known_for() -> None:
    trace = conversations()
    results = {name: run_policy(name, trace, 0.5, replicas=4, blocks=200) for name in BASELINES}
    assert results["longest_prefix"].skew == 4  # all share the first block
    assert results["sglang"].block_hit_rate > 1.3 * results["round_robin"].block_hit_rate
    assert results["prefix_hash"].block_hit_rate > 1.3 * results["random"].block_hit_rate


def test_ours_finds_what_is_warm_and_keeps_the_balance(url: str) -> None:
    trace = conversations()
    ours = run_policy("outrider", trace, 0.5, replicas=4, blocks=200, url=url)
    classic = run_policy("least_loaded", trace, 0.5, replicas=4, blocks=200)
    best = run_policy("longest_prefix", trace, 0.5, replicas=4, blocks=10_000)
    assert ours.block_hit_rate > 0.95 * best.block_hit_rate
    assert ours.skew < 2  # of 72 requests; everything to one replica would be 4
    assert ours.ttft_p99_s < classic.ttft_p99_s
    assert ours == run_policy("outrider", trace, 0.5, replicas=4, blocks=200, url=url)  # a replay is a replay


def test_several_gateways_do_as_well_as_one(url: str) -> None:
    trace = conversations(num=30)
    one, four = (run_policy("outrider", trace, 0.7, replicas=4, blocks=300, url=url, gateways=n) for n in (1, 4))
    assert four.block_hit_rate > 0.95 * one.block_hit_rate
    assert four.skew < 2


def test_the_document_has_a_row_for_each_policy_and_load(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {
            "timestamp": each.at_s * 1000,
            "input_length": each.prompt_tokens,
            "output_length": each.output_tokens,
            "hash_ids": each.blocks,
        }
        for each in conversations(num=3, turns=3)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    app = typer.Typer()
    app.command()(affinity.main)
    arguments = ["--trace", str(path), "--replicas", "2", "--blocks", "50", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout.strip().splitlines()[-1])["runs"]
    assert [(run["policy"], run["load"]) for run in runs] == [(p, load) for load in (0.5, 0.7, 0.9) for p in POLICIES]
    keys = {"policy", "load", "block_hit_rate", "skew", "ttft_p50_s", "ttft_p99_s", "rejected"}
    assert all(set(run) == keys for run in runs)
    refused = CliRunner().invoke(app, [*arguments, "--policies", "nonsense"])
    assert refused.exit_code == 2


async def test_the_cost_of_a_decision_is_measured(url: str) -> None:
    patient = StateConfig(timeout_s=10.0)  # a test machine may be busy
    measured = await measure(url, num_replicas=4, num_blocks=16, rate=50, seconds=1, config=patient)
    assert len(measured.decisions) == len(measured.hashing) == 50
    document = measured.document()
    assert 0 < document["p50_ms"] <= document["p90_ms"] <= document["p99_ms"]
    assert document["local_looks"] == document["failed_reports"] == 0


def test_rounds_are_told_by_their_median() -> None:
    rounds = [
        {"p50_ms": time_ms, "others_cores": 1.0, "local_looks": 1, "failed_reports": 0, "overtaken": 2}
        for time_ms in (9.0, 0.2, 0.3)
    ]
    assert medians(rounds) == {"p50_ms": 0.3, "local_looks": 3, "failed_reports": 0, "overtaken": 6}


def test_what_others_use_leaves_out_this_process() -> None:
    others, end = OthersUse(os.getpid()), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    cores = others.cores()
    if cores is not None:  # Linux; taken twice here: as this process, and as the server
        assert -1.1 < cores < (os.cpu_count() or 1)
    assert OthersUse(None).cores() is None


def test_a_load_continues_conversations_that_replicas_hold() -> None:
    load = Load(8, 20, 40, random.Random(0))
    held = [set(load.held_by(number)) for number in range(8)]
    prompts = [block_hashes(load.next()) for _ in range(60)]
    assert {len(prompt) for prompt in prompts} == {20}
    assert all(prompt[:4] == prompts[0][:4] and set(prompt[:4]) <= each for prompt in prompts for each in held)
    matched = [max(sum(block in each for block in prompt) for each in held) for prompt in prompts]
    assert min(matched) == 4
    assert max(matched) > 10
