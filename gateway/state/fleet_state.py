"""The state as a gateway uses it: shared while Redis answers, its own otherwise, and a count of how often.

No method raises StateUnavailableError: what a request needs is decided here, with less knowledge if need be. Only
`look` and `claim` wait for Redis. What else is told to it is told in the background, in any order: totals carry
versions and sums do not care.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.block_hash import BlockHash
from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient
from gateway.state.errors import StateUnavailableError
from gateway.state.fleet_view import FleetView
from gateway.state.load import LoadLedger, Reservation, Totals
from gateway.state.load_scripts import CLAIM, FINISH, FIRST_TOKEN, FORETELL, HEARTBEAT
from gateway.state.local_view import LocalView
from gateway.state.look import FleetReader
from gateway.state.wire import Argument


@dataclass(slots=True)
class StateCounts:
    """How often decisions had the shared state, and how often reports to it failed."""

    looks: int = 0
    local_looks: int = 0
    failed_reports: int = 0
    overtaken: int = 0  # claims that came too late: another request was sent there since the look

    @property
    def fallback_share(self) -> float:
        return self.local_looks / self.looks if self.looks else 0.0


class FleetState:
    """One model's fleet, seen and changed by one gateway. Belongs to one event loop."""

    def __init__(
        self, client: StateClient, config: StateConfig, gateway: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`gateway` must be unique among gateways and their restarts; `clock` gives seconds."""
        self._client = client
        self._config = config
        self._reader = FleetReader(client, config)
        # Records hold an entry for each gateway, under eight bytes.
        self._gateway = hashlib.blake2b(gateway.encode(), digest_size=8).digest()
        self._clock = clock
        self._lease_ms = math.ceil(config.load_lease_s * 1000)
        self._ledger = LoadLedger()
        self._local = LocalView(self._ledger)
        self._telling: set[asyncio.Task[None]] = set()
        self.counts = StateCounts()

    async def look(self, hashes: Sequence[BlockHash], replicas: Sequence[str], max_holders: int) -> FleetView:
        """`replicas`, and up to `max_holders` more that hold most of the prompt."""
        self.counts.looks += 1
        try:
            view = await self._reader.look(hashes, replicas, max_holders)
        except StateUnavailableError:
            self.counts.local_looks += 1
            return self._local.look(hashes, replicas, max_holders, self._clock())
        self._local.remember(view)
        return view

    def reserve(
        self,
        replica: str,
        hashes: Sequence[BlockHash],
        prompt_tokens: int,
        *,
        confirmed_blocks: int,
        new_tokens: int,
        prefill_rate: float,
        expected_s: float,
    ) -> Reservation:
        """Count the request at `replica`, and foretell that it will hold `hashes` beyond the confirmed ones."""
        reservation = Reservation(replica, prompt_tokens, new_tokens, prefill_rate, self._clock())
        self._report(CLAIM, replica, self._ledger.add(reservation), *self._claim(reservation, sends=-1))
        self._foretell(reservation, hashes, confirmed_blocks, expected_s)
        return reservation

    async def claim(
        self,
        replica: str,
        hashes: Sequence[BlockHash],
        prompt_tokens: int,
        *,
        sends: int | None,
        confirmed_blocks: int,
        new_tokens: int,
        prefill_rate: float,
        expected_s: float,
    ) -> Reservation | None:
        """`reserve`, unless more than `sends` requests were sent to `replica` by now: then None, and nothing changes.

        Where Redis does not say so in time, or `sends` is None, the request is reserved. Cancelling reserves nothing.
        """
        if sends is None:
            return self.reserve(
                replica,
                hashes,
                prompt_tokens,
                confirmed_blocks=confirmed_blocks,
                new_tokens=new_tokens,
                prefill_rate=prefill_rate,
                expected_s=expected_s,
            )
        reservation = Reservation(replica, prompt_tokens, new_tokens, prefill_rate, self._clock())
        totals = self._ledger.add(reservation)
        figures = (totals.version, totals.queued_tokens, totals.in_flight, self._lease_ms)
        arguments = (self._gateway, replica, *figures, *self._claim(reservation, sends))
        try:
            is_first = await self._client.run(CLAIM, *arguments)
        except StateUnavailableError:
            self.counts.failed_reports += 1
            is_first = True
        except asyncio.CancelledError:
            self.finish(reservation, 0)
            raise
        if not is_first:
            self.counts.overtaken += 1
            self.finish(reservation, 0)  # takes it out of totals that may have been told meanwhile
            return None
        self._foretell(reservation, hashes, confirmed_blocks, expected_s)
        return reservation

    def first_token(self, reservation: Reservation, cached_tokens: int) -> None:
        """Its prompt is computed; the engine found `cached_tokens` of it warm."""
        if reservation.first_token_at is not None or reservation.ended:
            return
        now = self._clock()
        totals = self._ledger.first_token(reservation, now)
        self._report(
            FIRST_TOKEN,
            reservation.replica,
            totals,
            int((now - reservation.sent_at) * 1000),
            reservation.prompt_tokens - cached_tokens,
            reservation.prefill_rate,
            reservation.expected_warm_tokens,
            cached_tokens,
        )

    def finish(self, reservation: Reservation, output_tokens: int) -> None:
        """It is over, however it ended. Harmless when repeated."""
        if reservation.ended:
            return
        totals = self._ledger.end(reservation)
        began = reservation.first_token_at
        decode_ms = 0 if began is None else int((self._clock() - began) * 1000)
        self._report(FINISH, reservation.replica, totals, output_tokens, decode_ms)

    async def heartbeat(self) -> None:
        """Renew the leases on this gateway's load; several times within load_lease_s."""
        figures: list[Argument] = []
        for replica, totals in self._ledger.busy():
            figures += [replica, totals.version, totals.queued_tokens, totals.in_flight]
        if figures:
            await self._send(HEARTBEAT, self._gateway, self._lease_ms, *figures)

    def in_flight(self, replica: str) -> int:
        """Requests that this gateway has there."""
        return self._ledger.totals(replica).in_flight

    def forget(self, replica: str) -> None:
        """It is gone from the fleet."""
        self._local.forget(replica)

    async def settled(self) -> None:
        """Wait until everything that was to be told has been, or has failed."""
        while self._telling:
            await asyncio.wait(self._telling)

    def _claim(self, reservation: Reservation, sends: int) -> tuple[Argument, ...]:
        half_life_ms = int(self._config.recent_half_life_s * 1000)
        return sends, reservation.new_tokens, reservation.prefill_rate, half_life_ms

    def _foretell(
        self, reservation: Reservation, hashes: Sequence[BlockHash], confirmed_blocks: int, expected_s: float
    ) -> None:
        self._local.sent(reservation.replica, hashes, reservation.sent_at)
        # Until the engine confirms, which is soon after the first token.
        predicted_s = min(self._config.predicted_ttl_s + expected_s, self._config.max_predicted_ttl_s)
        heat_ms = int(self._config.heat_s * 1000)
        self._tell(FORETELL, reservation.replica, int(predicted_s * 1000), heat_ms, confirmed_blocks, b"".join(hashes))

    def _report(self, script: Script, replica: str, totals: Totals, *further: Argument) -> None:
        figures = (totals.version, totals.queued_tokens, totals.in_flight, self._lease_ms)
        self._tell(script, self._gateway, replica, *figures, *further)

    def _tell(self, script: Script, *arguments: Argument) -> None:
        task = asyncio.ensure_future(self._send(script, *arguments))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _send(self, script: Script, *arguments: Argument) -> None:
        try:
            await self._client.run(script, *arguments)
        except StateUnavailableError:
            self.counts.failed_reports += 1  # the next report says it all again
