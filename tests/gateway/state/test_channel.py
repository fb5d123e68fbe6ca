"""Answers in the order of questions, over one connection that many share; and what becomes of them when it is lost."""

import asyncio
from collections.abc import AsyncIterator

import hiredis
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from gateway.state.channel import Channel
from gateway.state.embedded import EmbeddedServer
from gateway.state.wire import pack


async def opened(url: str, patience_s: float) -> Channel:
    connection = Redis.from_url(url).connection_pool.make_connection()  # type: ignore[no-untyped-call]
    await connection.connect()
    return Channel(connection, patience_s)


@pytest.fixture
async def channel(server: EmbeddedServer) -> AsyncIterator[Channel]:
    channel = await opened(server.url, 5.0)
    yield channel
    await channel.close()


async def test_many_ask_at_once_and_each_gets_its_answer(channel: Channel) -> None:
    futures = [channel.send(pack("ECHO", number), at_once=number % 3 > 0) for number in range(300)]
    assert await asyncio.gather(*futures) == [[str(number).encode()] for number in range(300)]


async def test_an_answer_larger_than_a_read_comes_whole(channel: Channel) -> None:
    text = b"x" * 5_000_000
    assert await channel.send(pack("ECHO", text) + pack("ECHO", "y"), 2) == [text, b"y"]


async def test_a_refusal_is_one_question_s_own(channel: Channel) -> None:
    before, refused, after = (channel.send(pack(*words)) for words in (("PING",), ("NO_SUCH",), ("ECHO", "z")))
    assert [await before, await after] == [[b"PONG"], [b"z"]]
    with pytest.raises(ResponseError, match="unknown command"):
        await refused


async def test_who_gives_up_leaves_the_others_in_order(channel: Channel) -> None:
    given_up, kept = channel.send(pack("ECHO", "a")), channel.send(pack("ECHO", "b"))
    given_up.cancel()
    assert await kept == [b"b"]


async def test_what_can_wait_leaves_with_what_cannot(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = channel._transport.write
    monkeypatch.setattr(channel._transport, "write", lambda data: (written.append(data), write(data)))
    slow, fast = channel.send(pack("ECHO", "a"), at_once=False), channel.send(pack("ECHO", "b"))
    assert await asyncio.gather(slow, fast) == [[b"a"], [b"b"]]
    alone = channel.send(pack("ECHO", "c"), at_once=False)
    assert len(written) == 1, "still waiting for company"
    assert await alone == [b"c"]
    assert len(written) == 2


async def test_all_that_wait_hear_of_a_loss(server: EmbeddedServer, channel: Channel) -> None:
    asked = [channel.send(pack("BLPOP", "nothing there", 0)), channel.send(pack("PING"), at_once=False)]
    await asyncio.sleep(0.02)
    owner = Redis.from_url(server.url)
    await owner.client_kill_filter(_type="normal", skipme=True)
    await owner.aclose()
    for future in asked:
        with pytest.raises(RedisConnectionError, match="closed"):
            await future
    assert not channel.is_open
    with pytest.raises(RedisConnectionError):
        await channel.send(pack("PING"))


async def test_a_server_that_never_answers_is_given_up(server: EmbeddedServer) -> None:
    channel = await opened(server.url, 0.05)
    asked = channel.send(pack("BLPOP", "nothing there", 0))
    with pytest.raises(RedisConnectionError, match="no answer within"):
        await asyncio.wait_for(asked, 1)
    assert not channel.is_open
    await channel.close()


async def test_what_redis_says_of_its_own_accord_is_no_answer(server: EmbeddedServer) -> None:
    channel, owner = await opened(server.url, 5.0), await opened(server.url, 5.0)
    took: list[object] = []
    take = channel._take
    try:
        channel._take = lambda answer: (took.append(answer), take(answer))  # type: ignore[method-assign]
        await channel.send(pack("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", "told:"))
        for number in range(20):
            waits = channel.send(pack("BLPOP", "told:list", 5) + pack("ECHO", number), 2)  # a push comes first
            await owner.send(pack("SET", "told:key", number) + pack("RPUSH", "told:list", number), 2)
            after = channel.send(pack("GET", "told:key"))
            word = str(number).encode()
            assert await waits == [[b"told:list", word], word]
            assert await after == [word]
        assert sum(isinstance(answer, hiredis.PushNotification) for answer in took) >= 20
    finally:
        await channel.close()
        await owner.close()


async def test_an_answer_that_nobody_asked_for_ends_the_connection(channel: Channel) -> None:
    """It must not pass for the answer to a later question."""
    assert await channel.send(pack("PING")) == [b"PONG"]
    channel.data_received(b"+PONG\r\n+PONG\r\n")
    assert not channel.is_open
    with pytest.raises(RedisConnectionError, match="closed"):
        await channel.send(pack("ECHO", "x"))


async def test_who_speaks_another_protocol_is_left(channel: Channel) -> None:
    asked = channel.send(pack("BLPOP", "nothing there", 0))
    channel.data_received(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(RedisConnectionError, match="not Redis's protocol"):
        await asked
    channel.data_received(b"\r\n")
