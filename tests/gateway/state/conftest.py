"""One embedded Redis for the tests of this folder; each test has keys of its own."""

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.embedded import EmbeddedServer
from tests.gateway.state.fleet import Clock

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(max_memory_mb=64) as running:
        yield running


@pytest.fixture
def config() -> StateConfig:
    return StateConfig(timeout_s=5.0, retry_s=0.01)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(server: EmbeddedServer, config: StateConfig, clock: Clock) -> AsyncIterator[StateClient]:
    client = StateClient(config, server.url, f"fleet-{next(_numbers)}", clock.milliseconds)
    yield client
    await client.close()
