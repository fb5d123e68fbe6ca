"""What one decision is made from: who holds how much of this prompt, and what every candidate has to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class ReplicaState(NamedTuple):  # of which a look makes many: frozen dataclasses take twelve times as long to make
    """One replica as the shared state knows it. None is unknown, which is not zero."""

    replica: str
    leased: bool  # it has spoken lately; otherwise it holds nothing that could be relied on
    draining: bool = False
    confirmed_blocks: int = 0  # of this prompt, in a row from its start, as the engine says
    predicted_blocks: int = 0  # the same with what gateways have sent there lately; at least confirmed_blocks
    queued_tokens: float | None = None  # uncached prompt tokens sent and not yet prefilled
    in_flight: int | None = None  # requests sent and not yet ended
    recent_tokens: float = 0.0  # uncached prompt tokens sent, halved every recent_half_life_s
    prefill_rate: float | None = None  # tokens/s, learned
    decode_rate: float | None = None  # tokens/s of all its sequences together, learned
    kv_use: float | None = None  # share of its KV blocks that running sequences hold
    trust: float = 1.0  # found warm tokens over promised ones, at most 1
    sends: int = 0  # requests ever sent there, by all gateways
    lapsed: bool = False  # it has spoken, but not lately; neither this nor leased: never, as far as Redis remembers


@dataclass(frozen=True, slots=True)
class FleetView:
    """The candidates, and how common each stretch of this prompt's blocks is."""

    replicas: dict[str, ReplicaState]
    holders: tuple[tuple[int, int], ...] = ()  # (depth, replicas whose match ends there), ascending, depth > 0
    heat: tuple[tuple[int, float], ...] = ()  # (depth, recent requests for that block), ascending; none elsewhere
    pinned: str | None = None  # where the session's last request went
    num_trips: int = 1  # to Redis: what is here was true at the first
    source: str = "shared"  # or "local": what this gateway knows by itself
    matched_blocks: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matched_blocks", self.holders[-1][0] if self.holders else 0)
