"""Which replica is behind which slot: what a reader remembers between looks, and every record it reads confirms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.state.record import SLOT_BYTES, read_slot
from gateway.state.wire import pack_keys

# More names than a fleet has: those of replicas that are gone are among them.
_MAX_NAMES = 4096

Records = dict[str, bytes | None]


class SlotNames:
    """Of one fleet."""

    def __init__(self, key_prefix: bytes) -> None:
        """`key_prefix` and a name are the key of the replica's record."""
        self._key_prefix = key_prefix
        self._names: dict[int, str] = {}
        self._seen: dict[str, bytes] = {}  # how each record began: most say the same again
        self._packed: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, slot: int) -> bool:
        return slot in self._names

    def all(self) -> Iterable[str]:
        return self._names.values()

    def of(self, slots: Sequence[int]) -> list[str]:
        """The replicas behind `slots`, without those that are not known."""
        return [name for slot in slots if (name := self._names.get(slot)) is not None]

    def pack_keys(self, names: Sequence[str]) -> bytes:
        """The keys of their records, as arguments of a command."""
        packed = self._packed
        return b"".join([packed.get(name) or self._pack(name) for name in names])

    def learn(self, records: Records) -> None:
        """Which slots these replicas have now; a slot that another replica has is no longer theirs."""
        for name, record in records.items():
            begins = record[:SLOT_BYTES] if record else b""
            if self._seen.get(name) != begins:
                self._forget(name)
                self._seen[name] = begins
                if record and (slot := read_slot(record)) is not None:
                    self._names[slot] = name

    def learn_names(self, slots: Sequence[int], names: Sequence[bytes | None]) -> None:
        """What Redis says is behind `slots`."""
        self._names.update({slot: name.decode() for slot, name in zip(slots, names, strict=True) if name is not None})

    def _forget(self, name: str) -> None:
        for slot in [slot for slot, known in self._names.items() if known == name]:
            del self._names[slot]

    def _pack(self, name: str) -> bytes:
        if len(self._packed) >= _MAX_NAMES:
            self._packed.clear()
            self._seen.clear()
            self._names.clear()
        packed = self._packed[name] = pack_keys(self._key_prefix, [name])
        return packed
