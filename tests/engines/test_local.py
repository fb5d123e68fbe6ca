"""Our engine keeps every engine's promises, and those of a process that owns a thread."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import local
from engines.admission import Limits
from engines.block_hash import extend_hashes, root_hash
from engines.block_journal import BlockJournal, WatchesBlocks
from engines.build import load_engine
from engines.config import LocalEngineConfig
from engines.core import CoreSettings, EngineCore
from engines.errors import EngineDeadError, EngineError, EngineOverloadedError, InvalidRequestError, ModelLoadError
from engines.local import LoadedEngine, LocalEngine
from engines.protocol import Engine
from engines.speculation import SpeculativeDecoding
from engines.tokenizer import Tokenizer
from engines.types import GenerateRequest, ModelCard, Prompt, SamplingParams, TextPrompt, TokenPrompt
from tests.engines import tiny_models
from tests.engines.context_model import QueuedRunner, expected_tokens
from tests.engines.engine_contract import EngineContract, collect, eventually, is_idle
from tests.engines.fake_device import DEVICE, FakeDevice
from tests.engines.tokenizers import character_tokenizer, word_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save(tiny_models.SUPPORTED["llama"](), tmp_path_factory.mktemp("llama"))
    character_tokenizer().save_pretrained(folder)
    return folder


def make_config(checkpoint: Path, **settings: Any) -> LocalEngineConfig:
    small = {"kv_cache_bytes": 1 << 20, "num_threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LocalEngineConfig.model_validate({"model": str(checkpoint), "device": "cpu"} | small | settings)


class TestContract(EngineContract):
    @pytest.fixture(autouse=True)
    def _checkpoint(self, checkpoint: Path) -> None:
        self.config = make_config(checkpoint)
        self.tokenizer = Tokenizer.load(str(checkpoint))

    @pytest.fixture
    def engine_factory(self) -> Callable[[], Engine]:
        return lambda: LocalEngine(self.config)

    def make_prompt(self, engine_text: str) -> Prompt:
        return TokenPrompt(self.tokenizer.encode(engine_text))


def request(max_tokens: int = 8, prompt: tuple[int, ...] = (5, 6, 7), **sampling: Any) -> GenerateRequest:
    params = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | sampling
    return GenerateRequest("r", TokenPrompt(prompt), SamplingParams(**params))


@pytest.fixture
async def engine(checkpoint: Path) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(make_config(checkpoint))
    await engine.start()
    yield engine
    await engine.close()


async def test_the_card_tells_what_was_resolved(engine: LocalEngine) -> None:
    card = await engine.start()
    assert card.max_model_len == 512
    assert card.vocab_size == tiny_models.VOCAB_SIZE
    assert card.details["architecture"] == "LlamaForCausalLM (llama)"
    assert card.details["dtype"] == "float32"


async def test_the_prefix_cache_is_watched_from_the_first_block_on(checkpoint: Path) -> None:
    engine, journal = LocalEngine(make_config(checkpoint, block_size=4, drafter={"kind": "none"})), BlockJournal()
    engine.watch_blocks(journal)
    assert isinstance(engine, WatchesBlocks)
    try:
        card = await engine.start()
        assert card.prefix_blocks is not None
        hashes: list[bytes] = []
        root = root_hash(card.prefix_blocks.model, salt="tenant")
        extend_hashes(hashes, root, tuple(range(5, 15)), card.prefix_blocks.block_size)
        asked = replace(request(max_tokens=1, prompt=tuple(range(5, 15))), cache_salt="tenant")
        first = [item async for item in engine.generate(asked)]
        assert list(journal.take()) == [(block_hash, True) for block_hash in hashes]
        again = [item async for item in engine.generate(asked)]
        assert [items[0][0].cached_tokens for items in (first, again)] == [0, 8]
    finally:
        await engine.close()


async def test_without_a_prefix_cache_there_are_no_blocks_to_name(checkpoint: Path) -> None:
    engine = LocalEngine(make_config(checkpoint, enable_prefix_caching=False))
    try:
        assert (await engine.start()).prefix_blocks is None
    finally:
        await engine.close()


async def test_the_fingerprint_follows_the_configuration(checkpoint: Path) -> None:
    fingerprints = set()
    for settings in ({}, {"max_num_batched_tokens": 128}, {"dtype": "bfloat16"}):
        engine = LocalEngine(make_config(checkpoint, **settings))
        fingerprints.add((await engine.start()).fingerprint)
        await engine.close()
    assert len(fingerprints) == 3


async def test_a_seeded_request_reads_the_same_after_a_restart_alone_or_not(checkpoint: Path) -> None:
    texts = []
    for company in (0, 7):
        engine = LocalEngine(make_config(checkpoint))
        await engine.start()
        others = [request(30, prompt=(9, i), temperature=1.0) for i in range(company)]
        wanted = request(40, temperature=1.0, seed=11, top_p=0.9)
        outcomes = await asyncio.gather(*(collect(engine, one) for one in [wanted, *others]))
        texts.append(outcomes[0].choices[0].text)
        await engine.close()
    assert texts[0] == texts[1]


async def test_leaving_frees_the_blocks_within_one_step(checkpoint: Path) -> None:
    engine = LocalEngine(make_config(checkpoint))
    await engine.start()
    stream = engine.generate(request(400))
    await anext(stream)
    steps = (await engine.stats()).num_steps
    await stream.aclose()

    async def idle() -> bool:
        return is_idle(await engine.stats())

    await eventually(idle)
    # One step may have been under way when the reader left, and its news on their way.
    assert (await engine.stats()).num_steps <= steps + 2
    await engine.close()


async def test_who_delivers_does_not_keep_the_interpreter_from_the_step(checkpoint: Path) -> None:
    before = sys.getswitchinterval()
    engine = LocalEngine(make_config(checkpoint))
    try:
        await engine.start()
        assert sys.getswitchinterval() <= 0.0002
    finally:
        await engine.close()
        sys.setswitchinterval(before)


async def test_a_full_queue_is_refused(checkpoint: Path) -> None:
    engine = LocalEngine(make_config(checkpoint, max_num_seqs=1, max_num_waiting=1))
    await engine.start()
    streams = [engine.generate(request(300)) for _ in range(2)]
    readers: list[asyncio.Future[object]] = []
    for stream in streams:
        readers.append(asyncio.ensure_future(anext(stream)))
    await asyncio.sleep(0.01)
    with pytest.raises(EngineOverloadedError, match="2 requests"):
        await anext(engine.generate(request()))
    await engine.close()


async def test_a_crash_in_the_step_ends_every_stream_with_its_cause(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def load(config: LocalEngineConfig) -> LoadedEngine:
        loaded = load_engine(config)
        runner: Any = loaded.core._runner
        forward, count = runner.forward, iter(range(100))

        def failing(batch: Any) -> torch.Tensor:
            if next(count) == 3:
                raise MemoryError("no more")
            return forward(batch)

        runner.forward = failing
        return loaded

    engine = LocalEngine(make_config(checkpoint), load)
    await engine.start()
    with caplog.at_level(logging.CRITICAL), pytest.raises(EngineDeadError, match="MemoryError: no more"):
        await collect(engine, request(20))
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    with pytest.raises(EngineDeadError):
        await anext(engine.generate(request()))
    await engine.close()


async def test_a_model_that_cannot_load_is_said_in_one_line(tmp_path: Path) -> None:
    engine = LocalEngine(make_config(tmp_path / "nothing"))
    with pytest.raises(ModelLoadError) as refused:
        await engine.start()
    assert "\n" not in str(refused.value)
    with pytest.raises(EngineDeadError, match="could not start"):
        await engine.check_health()
    await engine.close()


async def test_a_budget_that_cannot_serve_is_refused_at_load(checkpoint: Path) -> None:
    engine = LocalEngine(make_config(checkpoint, max_num_seqs=65, max_num_batched_tokens=64))
    with pytest.raises(ModelLoadError, match=r"max_num_batched_tokens \(64\) is below max_num_seqs \(65\)"):
        await engine.start()
    await engine.close()


async def test_a_request_that_cannot_be_added_ends_alone(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load(config: LocalEngineConfig) -> LoadedEngine:
        loaded = load_engine(config)
        core: Any = loaded.core
        add = core.add

        def choosy(key: int, request: GenerateRequest, arrival_s: float) -> None:
            if request.sampling.seed == 13:
                raise OverflowError("unlucky")
            add(key, request, arrival_s)

        core.add = choosy
        return loaded

    engine = LocalEngine(make_config(checkpoint), load)
    await engine.start()
    other = asyncio.create_task(collect(engine, request(100)))
    with caplog.at_level(logging.CRITICAL), pytest.raises(EngineError, match="unlucky"):
        await anext(engine.generate(request(seed=13)))
    assert len((await other).choices[0].token_ids) == 100
    await engine.check_health()
    await engine.close()


class TestClosing:
    """`close` at every moment of an engine's life."""

    def slow_load(self, config: LocalEngineConfig) -> LoadedEngine:
        time.sleep(0.2)
        return load_engine(config)

    async def test_while_it_loads(self, checkpoint: Path) -> None:
        engine = LocalEngine(make_config(checkpoint), self.slow_load)
        waiting = [asyncio.create_task(engine.start()), asyncio.create_task(engine.check_health())]
        await asyncio.sleep(0.02)
        waiting.append(asyncio.create_task(collect(engine, request())))
        await asyncio.sleep(0.02)
        await engine.close()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 3

    async def test_before_it_starts(self, checkpoint: Path) -> None:
        engine = LocalEngine(make_config(checkpoint))
        await engine.close()
        with pytest.raises(EngineDeadError):
            await engine.start()
        assert not any(thread.name == "engine-loop" for thread in threading.enumerate())

    async def test_a_failed_load_nobody_waits_for_is_no_stray_exception(self, tmp_path: Path) -> None:
        engine = LocalEngine(make_config(tmp_path / "nothing"))
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        start.cancel()
        stray: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
        await asyncio.sleep(0.5)
        await engine.close()
        del engine, start
        gc.collect()
        assert stray == []

    def test_never_in_a_process_that_ends_in_the_middle_of_a_step(self, checkpoint: Path) -> None:
        script = f"""
import asyncio
from engines.local import LocalEngine
from tests.engines.test_local import Path, make_config, request
async def main():
    engine = LocalEngine(make_config(Path({str(checkpoint)!r})))
    await engine.start()
    await anext(engine.generate(request(400)))
asyncio.run(main())
"""
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert (answer.returncode, answer.stderr.count("terminate called")) == (0, 0), answer.stderr


class TestOnADevice:
    """A device that runs behind its host: the loop launches, tells, and takes messages while it runs."""

    VOCAB = 40

    def load(self, config: LocalEngineConfig) -> LoadedEngine:
        device = FakeDevice()
        device.__enter__()  # on the loop thread, and for as long as that
        limits = Limits(max_model_len=64, vocab_size=self.VOCAB, num_blocks=64, block_size=4, max_num_seqs=8)
        settings = CoreSettings("context", limits, 32, True, 3.0, frozenset({0}), DEVICE)
        runner = QueuedRunner(device, limits.num_blocks, limits.block_size, self.VOCAB, keeps_busy=False)
        decoding = SpeculativeDecoding.off()
        core = EngineCore(settings, runner, word_tokenizer(self.VOCAB), decoding)
        card = ModelCard("context", frozenset({"tokens"}), "fingerprint")
        return LoadedEngine(core, decoding.speculator, limits, card)

    async def test_everybody_reads_what_they_would_alone(self, checkpoint: Path) -> None:
        engine = LocalEngine(make_config(checkpoint), self.load)
        await engine.start()
        wanted = [request(20, prompt=(5, 6, i), temperature=1.0, seed=i) for i in range(4)]
        leaver = engine.generate(request(30, prompt=(9,)))
        await anext(leaver)
        reading = [asyncio.create_task(collect(engine, one)) for one in wanted]
        await leaver.aclose()
        for i, outcome in enumerate(await asyncio.gather(*reading)):
            params = SamplingParams(max_tokens=20)
            assert list(outcome.choices[0].token_ids) == expected_tokens((5, 6, i), params, i, self.VOCAB)

        async def idle() -> bool:
            return is_idle(await engine.stats())

        await eventually(idle)
        assert (await engine.stats()).num_finished == 4
        await engine.close()

    async def test_closing_leaves_a_step_behind(self, checkpoint: Path) -> None:
        engine = LocalEngine(make_config(checkpoint), self.load)
        await engine.start()
        stream = engine.generate(request(40))
        await anext(stream)
        await engine.close()
        assert not any(thread.name == "engine-loop" for thread in threading.enumerate())
        await stream.aclose()


async def test_text_is_refused_since_token_ids_travel(engine: LocalEngine) -> None:
    with pytest.raises(InvalidRequestError, match="token ids"):
        await anext(engine.generate(GenerateRequest("r", TextPrompt("a"), SamplingParams(max_tokens=1))))


async def test_closing_ends_the_thread(checkpoint: Path) -> None:
    engine = LocalEngine(make_config(checkpoint))
    await engine.start()
    assert any(thread.name == "engine-loop" for thread in threading.enumerate())
    await engine.close()
    assert not any(thread.name == "engine-loop" for thread in threading.enumerate())


class TestWhatIsLearnt:
    """Costs outlive the process in a file."""

    async def generate(self, config: LocalEngineConfig) -> None:
        engine = LocalEngine(config)
        await engine.start()
        await collect(engine, request(max_tokens=20))
        await engine.close()

    async def test_it_is_kept_at_the_end_and_taken_up_at_the_start(self, checkpoint: Path, tmp_path: Path) -> None:
        config = make_config(checkpoint, costs_file=str(tmp_path / "costs.json"))
        await self.generate(config)
        assert (tmp_path / "costs.json").exists()
        assert load_engine(config).speculator.state()["prices"]["verify"] is not None

    async def test_it_is_kept_under_way(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = threading.Event()
        loaded = load_engine(make_config(checkpoint, costs_file=""))
        monkeypatch.setattr(local, "_FIRST_KEEP_S", 0.0)
        engine = LocalEngine(make_config(checkpoint), lambda _: replace(loaded, keep=kept.set))
        await engine.start()
        await collect(engine, request())
        assert kept.is_set()
        await engine.close()

    @pytest.mark.parametrize("place", ["/proc/nowhere/costs.json", "~nosuchuser/costs.json", "a\0b"])
    async def test_where_it_cannot_be_kept_the_engine_serves_nevertheless(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        await self.generate(make_config(checkpoint, costs_file=place))
        assert not os.listdir(tmp_path), "nothing is left where nobody looks for it"

    async def test_nothing_is_written_where_nothing_is_to_be(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        await self.generate(make_config(checkpoint, costs_file=""))
        await self.generate(make_config(checkpoint, drafter={"kind": "none"}))
        assert not os.listdir(tmp_path)
