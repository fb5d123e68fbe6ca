"""Which replica is behind which slot: remembered between looks, and believed where its record says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.state.record import read_slot

# More names than a fleet has: those of replicas that are gone are among them.
_MAX_NAMES = 4096

Records = dict[bytes, bytes]  # by replica; those that have one


class SlotNames:
    """Of one fleet."""

    def __init__(self) -> None:
        self._names: dict[int, bytes] = {}
        self._slots: dict[bytes, int] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._names

    def known(self, slots: Sequence[int]) -> list[bytes]:
        """The replicas that were seen behind `slots`; those behind others are left out."""
        return [name for slot in slots if (name := self._names.get(slot)) is not None]

    def confirmed(self, slots: Sequence[int], records: Mapping[bytes, bytes]) -> list[bytes]:
        """The replicas behind `slots`, without those of which `records` say nothing or something else."""
        return [
            name
            for slot in slots
            if (name := self._names.get(slot)) is not None
            and (record := records.get(name)) is not None
            and read_slot(record) == slot
        ]

    def learn(self, records: Mapping[bytes, bytes]) -> None:
        """Which slots these replicas have now; a slot that one of them had before is no longer its own."""
        if len(self._names) + len(records) > _MAX_NAMES:
            self._names.clear()
            self._slots.clear()
        for name, record in records.items():
            self._set(name, read_slot(record))

    def learn_names(self, slots: Sequence[int], names: Sequence[bytes | None]) -> None:
        """What Redis says is behind `slots`."""
        for slot, name in zip(slots, names, strict=True):
            if name is not None:
                self._set(name, slot)

    def _set(self, name: bytes, slot: int | None) -> None:
        before = self._slots.pop(name, None)
        if before is not None and self._names.get(before) == name:
            del self._names[before]
        if slot is not None:
            self._slots[name], self._names[slot] = slot, name
