"""An engine's blocks reach the index whole and in order, whatever happens on the way."""

import asyncio
from collections.abc import Sequence

import pytest

from engines.block_journal import BlockJournal
from engines.errors import EngineDeadError
from gateway.routing.publisher import BlockPublisher
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.errors import StateUnavailableError
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import MAX_BATCH, Applied, EngineReport, PrefixIndex
from tests.gateway.state.fleet import Clock, chain

CONFIG = StateConfig(replica_lease_s=9.0, report_ttl_s=9.0, block_ttl_s=100.0)


class Index:
    """Keeps to PrefixIndex's words; `troubles` are raised, or answered, one for each call."""

    def __init__(self) -> None:
        self.epochs: list[str] = []
        self.messages: list[tuple[int, int, int]] = []  # sequence number, added, removed
        self.held: set[bytes] = set()
        self.seq = 0
        self.kv_use: float | None = None
        self.forgotten: list[str] = []
        self.troubles: list[Exception | Applied | None] = []

    async def register(self, replica: str, epoch: str) -> None:
        self._trouble()
        self.epochs.append(epoch)
        self.held, self.seq = set(), 0

    async def apply(
        self, replica: str, epoch: str, seq: int, added: Sequence[bytes], removed: Sequence[bytes], report: EngineReport
    ) -> Applied:
        trouble = self._trouble()
        if trouble is not None:
            return trouble
        assert epoch == self.epochs[-1]
        assert len(added) + len(removed) <= MAX_BATCH
        self.messages.append((seq, len(added), len(removed)))
        self.kv_use = report.kv_use
        if seq > self.seq:
            assert seq == self.seq + 1
            self.seq = seq
            self.held = (self.held | set(added)) - set(removed)
        return Applied.OK

    async def forget(self, replica: str) -> None:
        self.forgotten.append(replica)

    def _trouble(self) -> Applied | None:
        trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, Exception):
            raise trouble
        return trouble


def _publisher(index: Index, journal: BlockJournal, clock: Clock | None = None) -> BlockPublisher:
    return BlockPublisher(index, "r1", journal, CONFIG, clock or Clock())  # type: ignore[arg-type]


async def test_what_is_held_is_told_and_nothing_twice() -> None:
    index, journal = Index(), BlockJournal()
    publisher = _publisher(index, journal)
    a, b, c = chain("x", 3)
    journal.added(a)
    journal.added(b)
    await publisher.publish(0.25)
    assert (index.held, index.kv_use) == ({a, b}, 0.25)
    journal.evicted(a)
    journal.added(c)
    await publisher.publish(0.5)
    await publisher.publish(0.5)
    assert index.held == {b, c}
    assert index.messages == [(1, 2, 0), (2, 1, 1)]


async def test_what_came_and_went_before_it_was_told_is_not_held() -> None:
    index, journal = Index(), BlockJournal()
    publisher = _publisher(index, journal)
    (a,) = chain("x", 1)
    journal.added(a)
    journal.evicted(a)
    await publisher.publish(0.0)
    assert index.held == set()


async def test_many_blocks_go_in_several_messages() -> None:
    index, journal = Index(), BlockJournal()
    hashes = chain("x", 2 * MAX_BATCH + 1)
    for block_hash in hashes:
        journal.added(block_hash)
    await _publisher(index, journal).publish(0.0)
    assert index.held == set(hashes)
    assert [message[:2] for message in index.messages] == [(1, MAX_BATCH), (2, MAX_BATCH), (3, 1)]


async def test_a_message_without_an_answer_is_sent_again_as_it_was() -> None:
    index, journal = Index(), BlockJournal()
    publisher = _publisher(index, journal)
    a, b = chain("x", 2)
    journal.added(a)
    index.troubles = [None, StateUnavailableError("late")]
    with pytest.raises(StateUnavailableError):
        await publisher.publish(0.0)
    journal.added(b)
    await publisher.publish(0.0)
    assert index.messages == [(1, 1, 0), (2, 1, 0)]
    assert index.held == {a, b}


@pytest.mark.parametrize("answer", [Applied.GAP, Applied.UNKNOWN])
async def test_a_gap_or_a_restart_begins_an_epoch_with_all_that_is_held(answer: Applied) -> None:
    index, journal = Index(), BlockJournal()
    publisher = _publisher(index, journal)
    a, b = chain("x", 2)
    journal.added(a)
    await publisher.publish(0.0)
    index.held = set()  # Redis has forgotten
    journal.added(b)
    index.troubles = [answer]
    await publisher.publish(0.0)
    await publisher.publish(0.0)
    assert len(set(index.epochs)) == 2
    assert index.held == {a, b}


async def test_the_lease_is_renewed_without_news_and_old_claims_are_repeated() -> None:
    index, journal, clock = Index(), BlockJournal(), Clock()
    publisher = _publisher(index, journal, clock)
    (a,) = chain("x", 1)
    journal.added(a)
    await publisher.publish(0.0)
    clock.now_s += 2.9
    await publisher.publish(0.0)
    assert index.messages == [(1, 1, 0)]
    clock.now_s += 0.2
    await publisher.publish(0.0)
    assert index.messages[-1] == (1, 0, 0)
    clock.now_s += 50.0
    await publisher.publish(0.0)
    assert index.messages[-1] == (2, 1, 0)


async def test_a_long_outage_is_told_as_a_snapshot_and_not_as_a_history() -> None:
    index, journal = Index(), BlockJournal()
    publisher = _publisher(index, journal)
    await publisher.publish(0.0)
    for block_hash in chain("x", 9000):
        journal.added(block_hash)
        journal.evicted(block_hash)
    index.troubles = [StateUnavailableError("away")]
    with pytest.raises(StateUnavailableError):
        await publisher.publish(0.0)
    await publisher.publish(0.0)
    assert len(index.epochs) == 2
    assert index.messages == []


async def test_it_ends_with_the_engine_and_says_so() -> None:
    index, journal = Index(), BlockJournal()
    index.troubles = [StateUnavailableError("away")]
    rounds = [0.1, 0.2]

    async def kv_use() -> float:
        if not rounds:
            raise EngineDeadError("It has crashed.")
        return rounds.pop(0)

    async with asyncio.timeout(5):
        await _publisher(index, journal).run(kv_use, 0.0)
    assert len(index.epochs) == 1
    assert index.forgotten == ["r1"]


async def test_an_engine_that_fails_is_asked_ever_less_and_written_about_once_an_outage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("gateway.routing.publisher.asyncio.sleep", sleep)
    rounds: list[float | Exception] = [RuntimeError("no answer")] * 6 + [0.1, ValueError("?"), EngineDeadError("x")]

    async def kv_use() -> float:
        if isinstance(outcome := rounds.pop(0), Exception):
            raise outcome
        return outcome

    index = Index()
    await _publisher(index, BlockJournal()).run(kv_use, 0.25)
    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0, 0.25, 0.5]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError, ValueError]


async def test_a_real_index_believes_it(client: StateClient, config: StateConfig, clock: Clock) -> None:
    journal, hashes = BlockJournal(), chain("x", 40)
    publisher = BlockPublisher(PrefixIndex(client, config), "r1", journal, config)
    for block_hash in hashes[:30]:
        journal.added(block_hash)
    await publisher.publish(0.5)
    state = FleetState(client, config, "gateway", clock)
    view = await state.look(hashes, ["r1"], 4)
    assert view.replicas["r1"].confirmed_blocks == 30
    assert view.replicas["r1"].kv_use == 0.5
    await PrefixIndex(client, config).forget("r1")
    await publisher.publish(0.5)
    clock.now_s += config.replica_lease_s / 2
    journal.added(hashes[30])
    await publisher.publish(0.5)
    await publisher.publish(0.5)
    view = await state.look(hashes, ["r1"], 4)
    assert (view.replicas["r1"].confirmed_blocks, publisher.num_epochs) == (31, 2)
