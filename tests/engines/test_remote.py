"""RemoteEngine by the contract, against a real server on a local port."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from engines.config import EchoEngineConfig, RemoteEngineConfig
from engines.errors import EngineDeadError
from engines.remote import RemoteEngine
from engines.types import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from tests.engines.engine_contract import EngineContract, EngineFactory, collect, eventually
from tests.engines.fake_openai_server import MODEL, FakeOpenAIServer, serve


class _RemoteContract(EngineContract):
    tells_token_ids = False

    @pytest.fixture
    async def server(self) -> AsyncIterator[tuple[FakeOpenAIServer, str]]:
        async with serve(EchoEngineConfig(token_delay_s=0.0005)) as server:
            yield server

    @pytest.fixture
    def engine_factory(self, server: tuple[FakeOpenAIServer, str]) -> EngineFactory:
        config = RemoteEngineConfig(base_url=server[1], model=MODEL, accepts_token_ids=True)
        return lambda: RemoteEngine(config)


class TestChat(_RemoteContract):
    def make_prompt(self, engine_text: str) -> Prompt:
        return ChatPrompt((ChatMessage("user", engine_text),))

    async def test_leaving_is_noticed_by_the_server(
        self, server: tuple[FakeOpenAIServer, str], engine_factory: EngineFactory
    ) -> None:
        engine, fake = engine_factory(), server[0]
        await engine.start()
        stream = engine.generate(self.request(max_tokens=3000, n=2))
        await anext(stream)
        assert (await fake.engine.stats()).num_running == 2
        await stream.aclose()

        async def is_aborted() -> bool:
            stats = await fake.engine.stats()
            return stats.num_running == 0 and stats.num_aborted == 1

        await eventually(is_aborted)
        await engine.close()


class TestText(_RemoteContract):
    def make_prompt(self, engine_text: str) -> Prompt:
        return TextPrompt(engine_text)


class TestTokens(_RemoteContract):
    def make_prompt(self, engine_text: str) -> Prompt:
        return TokenPrompt(tuple(engine_text.encode()))

    async def test_a_server_that_dies_in_a_stream_is_told(
        self, server: tuple[FakeOpenAIServer, str], engine_factory: EngineFactory
    ) -> None:
        engine = engine_factory()
        await engine.start()
        stream = engine.generate(self.request(max_tokens=3000))
        await anext(stream)
        await server[0].engine.close()
        with pytest.raises(EngineDeadError, match="closed"):
            [item async for item in stream]
        await engine.close()

    async def test_the_context_window_is_read_from_the_server(self, engine_factory: EngineFactory) -> None:
        engine = engine_factory()
        assert (await engine.start()).max_model_len == EchoEngineConfig().max_model_len
        assert (await collect(engine, self.request("ab", max_tokens=3))).choices[0].text == "aba"
        await engine.close()

    async def test_a_connection_is_used_again(
        self, server: tuple[FakeOpenAIServer, str], engine_factory: EngineFactory
    ) -> None:
        engine = engine_factory()
        await engine.start()
        for _ in range(3):
            await collect(engine, self.request())
        assert len(server[0].client_ports) == 1
        await engine.close()
