"""Our own engine: a paged, continuously batched step loop on a thread of its own.

asyncio side                                   loop thread
generate() -- Add(key, request) -->  inbox  --> core.add
           -- Abort(key) --------->         --> core.abort          between two steps
           <-- deltas ------------- mailbox <-- core.step           on a GPU, while the next step runs there
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from drafting.speculator import Speculator
from engines.admission import Limits, check_request
from engines.block_journal import BlockObserver
from engines.config import LocalEngineConfig
from engines.core import EngineCore
from engines.errors import EngineDeadError, EngineError, EngineOverloadedError
from engines.mailbox import Mailbox
from engines.types import Delta, EngineStats, GenerateRequest, ModelCard

_log = logging.getLogger(__name__)

_EXIT_WAIT_S = 10.0
_SWITCH_INTERVAL_S = 0.0002
# Soon, since a first try may be short; later seldom.
_FIRST_KEEP_S = 5.0
_MAX_KEEP_PERIOD_S = 60.0


def _nothing() -> None:
    pass


def _unwatched(observer: BlockObserver) -> None:
    raise EngineError("This engine has no prefix cache to watch.")


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What loading yields: the step, what it can hold, what it is, how to keep what it has learnt on disk, and how to
    watch its prefix cache.

    `speculator` is the step's own: it is touched between two steps, if at all.
    """

    core: EngineCore
    speculator: Speculator
    limits: Limits
    card: ModelCard
    keep: Callable[[], None] = _nothing
    watch: Callable[[BlockObserver], None] = _unwatched


@dataclass(frozen=True, slots=True)
class _Add:
    key: int
    request: GenerateRequest
    arrival_s: float


@dataclass(frozen=True, slots=True)
class _Abort:
    key: int


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class LocalEngine:
    """The Engine protocol over an EngineCore. `load` runs on the loop thread, so that one thread owns torch's state."""

    def __init__(
        self, config: LocalEngineConfig, load: Callable[[LocalEngineConfig], LoadedEngine] | None = None
    ) -> None:
        self._config = config
        self._load = load or _load_engine
        self._observer: BlockObserver | None = None
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[int, Mailbox] = {}  # touched on the asyncio side only
        self._keys = itertools.count()
        self._stats = EngineStats()
        self._thread: threading.Thread | None = None
        self._ready: asyncio.Future[LoadedEngine] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: EngineDeadError | None = None
        self._is_orphaned = False  # the event loop was closed before the engine; touched on the loop thread only

    def watch_blocks(self, observer: BlockObserver) -> None:
        """Have the loop thread tell `observer` what the prefix cache gains and loses. To be called before `start`."""
        assert self._thread is None
        self._observer = observer

    async def start(self) -> ModelCard:
        """Load the model and start the loop thread. Raises ModelLoadError, EngineDeadError after `close`."""
        if self._ready is None:
            self._check_alive()
            self._loop = asyncio.get_running_loop()
            self._ready = self._loop.create_future()
            # Whoever waited may be gone when loading fails; check_health still tells.
            self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
            # A step hands the interpreter over some two hundred times, at each kernel; whoever is awake beside it (the
            # event loop, delivering) would keep it for 5 ms each time.
            sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
            self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
            self._thread.start()
            # At exit the interpreter must not be taken apart under a thread that is inside torch.
            weakref.finalize(self, _end_thread, self._inbox, self._thread)
        loaded = await asyncio.shield(self._ready)
        self._check_alive()
        return loaded.card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """See Engine.generate."""
        loaded = await self._loaded()
        check_request(request, loaded.limits)
        bound = self._config.max_num_seqs + self._config.max_num_waiting
        if len(self._mailboxes) >= bound:
            raise EngineOverloadedError(f"The engine already holds {bound} requests, its bound.")
        key = next(self._keys)
        mailbox = self._mailboxes[key] = Mailbox(request.n)
        self._inbox.put(_Add(key, request, time.monotonic()))
        try:
            while not mailbox.is_finished:
                yield await mailbox.get()
        finally:
            del self._mailboxes[key]
            if not mailbox.is_finished:
                self._inbox.put(_Abort(key))

    async def stats(self) -> EngineStats:
        """See Engine.stats."""
        return self._stats

    async def check_health(self) -> None:
        """See Engine.check_health."""
        await self._loaded()

    async def close(self) -> None:
        """See Engine.close. Returns when the loop thread has ended its step."""
        if self._dead is None:
            self._die(EngineDeadError("The engine was closed."))
        if self._thread is not None:
            self._inbox.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    async def _loaded(self) -> LoadedEngine:
        self._check_alive()
        if self._ready is None:
            raise EngineDeadError("The engine has not been started.")
        loaded = await asyncio.shield(self._ready)
        self._check_alive()  # it may have been closed meanwhile
        return loaded

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead.message) from self._dead

    def _die(self, error: EngineDeadError) -> None:
        """On the asyncio side: end every stream."""
        self._dead = error
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    def _deliver(self, news: list[tuple[int, tuple[Delta, ...]]], stats: EngineStats) -> None:
        """On the asyncio side: hand a step's deltas to their readers; those of readers who have left are dropped."""
        self._stats = stats
        for key, deltas in news:
            mailbox = self._mailboxes.get(key)
            if mailbox is not None:
                mailbox.put(deltas)

    def _run(self) -> None:
        """The loop thread: load, then step until stopped."""
        try:
            loaded = self._load(self._config)
            if self._observer is not None:
                loaded.watch(self._observer)
        except BaseException as error:  # noqa: BLE001 - the thread's border: the waiting `start` raises it
            self._post(self._fail_start, error)
            return
        self._post(self._set_ready, loaded)
        kept_s, period_s = time.monotonic(), _FIRST_KEEP_S
        try:
            while self._receive(loaded.core) and not self._is_orphaned:
                news = loaded.core.step() if loaded.core.has_work else []
                self._post(self._deliver, news, loaded.core.stats())
                if time.monotonic() > kept_s + period_s:
                    loaded.keep()
                    kept_s, period_s = time.monotonic(), min(2 * period_s, _MAX_KEEP_PERIOD_S)
            loaded.keep()
        except Exception as error:  # noqa: BLE001 - the thread's border: logged, and every stream ends with it
            _log.exception("the engine loop has crashed")
            dead = EngineDeadError(f"The engine loop has crashed: {type(error).__name__}: {error}")
            dead.__cause__ = error
            self._post(self._die, dead)

    def _receive(self, core: EngineCore) -> bool:
        """Take all messages, waiting for one while there is no work; False when told to stop.

        A step in flight lands first, so that the next one already knows of whoever has come during it.
        """
        core.wait()
        while True:
            try:
                message = self._inbox.get(block=not core.has_work)
            except queue.Empty:
                return True
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Abort):
                core.abort(message.key)
            else:
                self._add(core, message)
            if self._inbox.empty():
                return True

    def _add(self, core: EngineCore, message: _Add) -> None:
        try:
            core.add(message.key, message.request, message.arrival_s)
        except Exception as error:  # noqa: BLE001 - a request's border: one that cannot be added must not end the others
            known = error if isinstance(error, EngineError) else EngineError(f"Cannot add the request: {error}")
            if known is not error:
                _log.exception("a request could not be added")
            self._post(self._refuse, message.key, known)

    def _refuse(self, key: int, error: EngineError) -> None:
        mailbox = self._mailboxes.get(key)
        if mailbox is not None:
            mailbox.fail(error)

    def _set_ready(self, loaded: LoadedEngine) -> None:
        assert self._ready is not None
        if not self._ready.cancelled():
            self._ready.set_result(loaded)

    def _fail_start(self, error: BaseException) -> None:
        assert self._ready is not None
        self._dead = EngineDeadError(f"The engine could not start: {error}")
        if not self._ready.cancelled():
            self._ready.set_exception(error)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        """Run `call` on the asyncio side. Once its event loop is closed nobody reads any more, and the thread ends."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            self._is_orphaned = True


def _end_thread(inbox: queue.SimpleQueue[_Add | _Abort | _Stop], thread: threading.Thread) -> None:
    inbox.put(_Stop())
    thread.join(_EXIT_WAIT_S)


def _load_engine(config: LocalEngineConfig) -> LoadedEngine:
    from engines.build import load_engine  # imports transformers' model classes, and LoadedEngine from here

    return load_engine(config)
