"""The state as a gateway uses it: shared while Redis answers, its own otherwise, and a count of how often.

No method raises StateUnavailableError: what a request needs is decided here, with less knowledge if need be. Only
`look` and `claim` wait for Redis. What else is told to it is told in the background, in any order: totals carry
versions and sums do not care.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.block_hash import BlockHash
from gateway.state.company import Company
from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient, Told
from gateway.state.depths import sent_depths
from gateway.state.errors import StateUnavailableError
from gateway.state.fleet_view import FleetView
from gateway.state.load import LoadLedger, Reservation, Totals
from gateway.state.load_scripts import CLAIM, FINISH, FIRST_TOKEN, FORETELL, HEARTBEAT
from gateway.state.local_view import LocalView
from gateway.state.look import FleetReader
from gateway.state.wire import Argument


@dataclass(slots=True)
class StateCounts:
    """How often looks had the shared state, those of dry runs and of refused claims too; how often reports failed."""

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
        self._company = Company()
        self._num_telling = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self.counts = StateCounts()

    async def look(
        self, hashes: Sequence[BlockHash], replicas: Sequence[str], max_holders: int, session: BlockHash | None = None
    ) -> FleetView:
        """`replicas`, up to `max_holders` more that hold most of the prompt, and the one that `session` was sent to."""
        self.counts.looks += 1
        try:
            view = await self._reader.look(hashes, replicas, max_holders, session)
        except StateUnavailableError:
            self.counts.local_looks += 1
            return self._local.look(hashes, replicas, max_holders, self._clock(), session)
        self._local.remember(view, self._clock())
        if view.num_trips == 1:  # what came earlier is not to be compared with what is known now
            self._company.look(view.replicas.values(), self._clock())
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
        promised_tokens: int = 0,
        session: BlockHash | None = None,
    ) -> Reservation:
        """Count the request at `replica`, and foretell that it will hold `hashes` beyond the confirmed ones.

        Of `prompt_tokens`, `new_tokens` are expected to be computed; `promised_tokens` are in blocks that the engine
        itself has confirmed. Only by these is it judged: predictions are the gateways' own, and the engine finds
        siblings cold that it begins together.
        """
        reservation = Reservation(replica, prompt_tokens, new_tokens, prefill_rate, self._clock(), promised_tokens)
        self._company.sending(replica)
        totals = self._ledger.add(reservation)
        self._report(
            CLAIM,
            replica,
            totals,
            *self._claim(reservation, sends=-1),
            done=functools.partial(self._company.sent, replica),
        )
        self._foretell(reservation, hashes, confirmed_blocks, expected_s, session)
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
        promised_tokens: int = 0,
        session: BlockHash | None = None,
    ) -> Reservation | None:
        """`reserve`, unless more than `sends` requests were sent to `replica` by now: then None, and nothing changes.

        Where Redis does not say so in time, or `sends` is None, the request is reserved. Cancelling reserves nothing.
        A gateway that has been alone for a while knows by itself, and does not wait for Redis.
        """
        is_alone = self._company.is_alone(self._clock())
        if is_alone and sends is not None and sends != self._company.sends(replica):
            self.counts.overtaken += 1
            return None
        if sends is None or is_alone:
            return self.reserve(
                replica,
                hashes,
                prompt_tokens,
                confirmed_blocks=confirmed_blocks,
                new_tokens=new_tokens,
                prefill_rate=prefill_rate,
                expected_s=expected_s,
                promised_tokens=promised_tokens,
                session=session,
            )
        reservation = Reservation(replica, prompt_tokens, new_tokens, prefill_rate, self._clock(), promised_tokens)
        self._company.sending(replica)
        totals = self._ledger.add(reservation)
        figures = self._figures(totals)
        has_counted: bool | None = None
        try:
            is_first = has_counted = bool(
                await self._client.run(CLAIM, self._gateway, replica, *figures, *self._claim(reservation, sends))
            )
        except StateUnavailableError:
            self.counts.failed_reports += 1
            is_first = True
        except asyncio.CancelledError:
            self.finish(reservation, 0)
            raise
        finally:
            self._company.sent(replica, has_counted)
        if not is_first:
            self.counts.overtaken += 1
            self.finish(reservation, 0)  # takes it out of totals that may have been told meanwhile
            return None
        if has_counted:
            totals.arrived(figures[0])
        self._foretell(reservation, hashes, confirmed_blocks, expected_s, session)
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
            reservation.promised_tokens,
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
        busy = [(replica, totals, totals.version) for replica, totals in self._ledger.busy()]
        for replica, totals, version in busy:
            figures += [replica, version, totals.queued_tokens, totals.in_flight]
        if not figures:
            return
        try:
            await self._client.run(HEARTBEAT, self._gateway, self._lease_ms, *figures)
        except StateUnavailableError:
            self.counts.failed_reports += 1  # the next one says it all again
        else:
            for _, totals, version in busy:
                totals.arrived(version)

    def in_flight(self, replica: str) -> int:
        """Requests that this gateway has there."""
        return self._ledger.totals(replica).in_flight

    def forget(self, replica: str) -> None:
        """It is gone from the fleet."""
        self._ledger.forget(replica)
        self._local.forget(replica, self._clock())
        self._company.forget(replica)

    async def settled(self) -> None:
        """Wait until everything that was to be told has been, or has failed."""
        await self._settled.wait()

    def _claim(self, reservation: Reservation, sends: int) -> tuple[Argument, ...]:
        half_life_ms = int(self._config.recent_half_life_s * 1000)
        return sends, reservation.new_tokens, reservation.prefill_rate, half_life_ms

    def _foretell(
        self,
        reservation: Reservation,
        hashes: Sequence[BlockHash],
        confirmed_blocks: int,
        expected_s: float,
        session: BlockHash | None,
    ) -> None:
        """Say who will hold what: after the decision, which need not wait for it."""

        def foretell() -> None:
            self._local.sent(reservation.replica, hashes, reservation.sent_at, session)
            # Until the engine confirms, which is soon after the first token.
            predicted_s = min(self._config.predicted_ttl_s + expected_s, self._config.max_predicted_ttl_s)
            figures = int(predicted_s * 1000), int(self._config.heat_s * 1000)
            depths = sent_depths(len(hashes))
            blocks = b"".join([hashes[depth - 1] for depth in depths]), bisect.bisect(depths, confirmed_blocks)
            session_ms = int(self._config.session_ttl_s * 1000)
            self._tell(FORETELL, reservation.replica, *figures, *blocks, session or b"", session_ms)
            self._told(None, True)

        self._begin_telling()
        asyncio.get_running_loop().call_soon(foretell)

    def _report(
        self, script: Script, replica: str, totals: Totals, *further: Argument, done: Told | None = None
    ) -> None:
        version = totals.version

        def told(succeeded: bool | None) -> None:
            if succeeded:
                totals.arrived(version)
            if done is not None:
                done(succeeded)

        self._tell(script, self._gateway, replica, *self._figures(totals), *further, done=told)

    def _figures(self, totals: Totals) -> tuple[int, int, int, int]:
        return totals.version, totals.queued_tokens, totals.in_flight, self._lease_ms

    def _tell(self, script: Script, *arguments: Argument, done: Told | None = None) -> None:
        self._begin_telling()
        self._client.tell(script, *arguments, done=functools.partial(self._told, done))

    def _begin_telling(self) -> None:
        self._num_telling += 1
        self._settled.clear()

    def _told(self, done: Told | None, succeeded: bool | None) -> None:
        self._num_telling -= 1
        if not self._num_telling:
            self._settled.set()
        if not succeeded:
            self.counts.failed_reports += 1
        if done is not None:
            done(succeeded)
