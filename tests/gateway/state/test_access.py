"""TLS, users and passwords: who is let in, and that a refusal says what is wrong and is not mistaken for an outage."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from redis import Redis

from engines.block_hash import root_hash
from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient
from gateway.state.embedded import EmbeddedServer
from gateway.state.errors import StateAccessError, StateUnavailableError
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import PrefixIndex
from tests.gateway.redis_proxy import RedisProxy

ECHO = Script("return ARGV[3]")
PASSWORD = "STATE_PASSWORD"
# What configs/replicas.yaml tells operators to grant.
RIGHTS = ["~outrider:*", "+@read", "+@write", "-@dangerous", "+eval", "+evalsha", "+time", "+ping", "+select"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(max_memory_mb=16, directory=tmp_path_factory.mktemp("g")) as running:
        yield running


@pytest.fixture
def owner(guarded: EmbeddedServer) -> Iterator[Redis]:
    """May do everything. Afterwards nobody needs a password, and there are no users."""
    with Redis.from_url(guarded.url) as owner:
        yield owner
        owner.execute_command("ACL", "SETUSER", "default", "nopass")
        owner.execute_command("ACL", "DELUSER", "outrider")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(guarded: EmbeddedServer, authority: trustme.CA) -> Iterator[int]:
    """The port of that server behind TLS, which the wheel's is built without."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with RedisProxy(guarded.url, tls=context) as proxy:
        yield proxy.port


@pytest.fixture
def tcp(guarded: EmbeddedServer) -> Iterator[int]:
    """A port of that server."""
    with RedisProxy(guarded.url) as proxy:
        yield proxy.port


def _pem(authority: trustme.CA, folder: Path) -> Path:
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return folder / "ca.pem"


def _client(url: str, ca_file: Path | None = None, password_env: str | None = None) -> StateClient:
    config = StateConfig(url=url, ca_file=ca_file, password_env=password_env)
    return StateClient(config, url, "m", timeout_s=5)


async def test_state_travels_through_tls_with_a_password(
    owner: Redis, tls: int, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.execute_command("ACL", "SETUSER", "default", "resetpass", ">secret")
    monkeypatch.setenv(PASSWORD, "secret")
    client = _client(f"rediss://localhost:{tls}/0", _pem(authority, tmp_path), PASSWORD)
    try:
        await client.connect()
        long = "x" * 200_000  # more than a TLS record
        assert await asyncio.gather(*(client.run(ECHO, word) for word in ("a", long, "b"))) == [
            b"a",
            long.encode(),
            b"b",
        ]
        owner.execute_command("CLIENT", "KILL", "TYPE", "normal")  # the connection is opened again unnoticed
        assert await client.run(ECHO, "c") == b"c"
    finally:
        await client.close()


@pytest.mark.parametrize("polite", [True, False])
async def test_a_closed_client_leaves_no_socket_open_behind_tls(
    tls: int, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, polite: bool
) -> None:
    """Also where the server never says goodbye, as TLS wants it to."""
    monkeypatch.setattr("gateway.state.channel._FAREWELL_S", 5.0 if polite else 0.0)
    client = _client(f"rediss://localhost:{tls}", _pem(authority, tmp_path))
    await client.connect()
    channel = client._dialler.channel
    assert channel is not None
    sock = channel._transport.get_extra_info("socket")
    assert sock.fileno() >= 0
    await client.close()
    await asyncio.sleep(0)
    assert sock.fileno() == -1


@pytest.mark.parametrize("known", ["another authority", "the system's authorities"])
async def test_a_certificate_from_elsewhere_is_refused(tls: int, tmp_path: Path, known: str) -> None:
    ca_file = _pem(trustme.CA(), tmp_path) if known == "another authority" else None
    client = _client(f"rediss://localhost:{tls}", ca_file)
    try:
        for call in (client.connect(), client.run(ECHO, "x")):
            await asyncio.sleep(0.15)  # the pause
            with pytest.raises(StateAccessError, match="certificate verify failed"):
                await call
    finally:
        await client.close()


async def test_a_certificate_for_another_host_is_refused(tls: int, authority: trustme.CA, tmp_path: Path) -> None:
    client = _client(f"rediss://127.0.0.1:{tls}", _pem(authority, tmp_path))
    try:
        with pytest.raises(StateAccessError, match=r"not valid for '127\.0\.0\.1'"):
            await client.connect()
    finally:
        await client.close()


def test_a_file_without_authorities_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(StateAccessError, match=name):
            _client("rediss://localhost", tmp_path / name)


async def test_a_user_with_few_rights_is_enough(tcp: int, owner: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    owner.execute_command("ACL", "SETUSER", "outrider", "on", ">secret", *RIGHTS)
    monkeypatch.setenv(PASSWORD, "secret")
    client, config = _client(f"redis://outrider@localhost:{tcp}/2", password_env=PASSWORD), StateConfig()
    state, index, blocks = FleetState(client, config, "gateway"), PrefixIndex(client, config), [root_hash("x")]
    try:
        await client.connect()
        assert b"user=outrider" in owner.execute_command("CLIENT", "LIST")
        await index.register("r1", "epoch")
        await index.apply("r1", "epoch", 1, blocks)
        await index.drain("r1", drains=False)
        one = state.reserve("r1", blocks, 1, confirmed_blocks=0, new_tokens=1, prefill_rate=1.0, expected_s=0.1)
        state.first_token(one, 0)
        await state.heartbeat()
        view = await state.look(blocks, ["r1"], 1)
        assert (view.source, view.replicas["r1"].confirmed_blocks, view.replicas["r1"].in_flight) == ("shared", 1, 1)
        state.finish(one, 1)
        await index.forget("r1")
        await index.sweep()
        await state.settled()
        assert (state.counts.failed_reports, client.failures) == (0, 0)
    finally:
        await client.close()


async def test_a_database_that_is_not_ours_is_a_matter_of_rights(
    tcp: int, owner: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.execute_command("ACL", "SETUSER", "outrider", "on", ">secret", *RIGHTS, "-select")
    monkeypatch.setenv(PASSWORD, "secret")
    client = _client(f"redis://outrider@localhost:{tcp}/2", password_env=PASSWORD)
    try:
        with pytest.raises(StateAccessError, match="'select'"):
            await client.connect()
    finally:
        await client.close()


@pytest.mark.parametrize("scheme", ["redis", "unix"])
@pytest.mark.parametrize(
    ("user", "password", "words"),
    [
        ("outrider", "wrong", "username-password"),
        ("nobody", "secret", "username-password"),
        ("", "", "Authentication required"),
        ("outrider", "secret", "NOPERM"),
    ],
)
async def test_who_is_not_let_in_reads_why(
    guarded: EmbeddedServer,
    tcp: int,
    owner: Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    user: str,
    password: str,
    words: str,
    scheme: str,
) -> None:
    owner.execute_command("ACL", "SETUSER", "default", "resetpass", ">another")
    owner.execute_command("ACL", "SETUSER", "outrider", "on", ">secret", "-@all", "+ping")
    monkeypatch.setenv(PASSWORD, password)
    address = f"localhost:{tcp}" if scheme == "redis" else guarded.url.removeprefix("unix://")
    client = _client(f"{scheme}://{user and user + '@'}{address}", password_env=PASSWORD if password else None)
    try:
        with pytest.raises(StateAccessError, match=words):
            await client.run(ECHO, "x")
        assert not client.available
        with pytest.raises(StateUnavailableError):
            await client.run(ECHO, "x")
        (line,) = caplog.messages
        assert line.startswith("outrider:")
        assert words in line
    finally:
        await client.close()


async def test_an_outage_is_written_about_once_and_so_is_its_end(
    guarded: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    config = StateConfig(retry_s=0.001, max_retry_s=0.001)
    client = StateClient(config, guarded.url, "m", timeout_s=5)
    refused = Script("return redis.error_reply('OOM out of memory')")
    try:
        for script in (refused, refused, ECHO, ECHO, refused):
            await asyncio.sleep(0.01)
            with contextlib.suppress(StateUnavailableError):
                await client.run(script, "x")
        first, second = caplog.messages
        assert first.endswith("the shared state is unavailable: OOM out of memory")
        assert second.endswith("answers again")
    finally:
        await client.close()
