"""One gateway's own knowledge: bounded, fading, and of its own requests only."""

from gateway.state.fleet_view import FleetView, ReplicaState
from gateway.state.load import LoadLedger, Reservation
from gateway.state.local_view import LocalView
from tests.gateway.state.fleet import chain


def depths(view: FleetView) -> dict[str, int]:
    return {name: state.predicted_blocks for name, state in view.replicas.items()}


def test_it_knows_where_it_sent_which_prefix_for_a_while() -> None:
    local = LocalView(LoadLedger())
    prompt = chain("a", 5)
    local.sent("r1", prompt, now=0.0)
    local.sent("r2", prompt[:2], now=60.0)
    view = local.look(prompt, ["r3"], 8, now=100.0)
    assert depths(view) == {"r1": 5, "r2": 2, "r3": 0}
    assert view.holders == ((2, 1), (5, 1))
    assert depths(local.look(prompt, ["r3"], 1, now=100.0)) == {"r1": 5, "r3": 0}
    assert depths(local.look(prompt, [], 8, now=150.0)) == {"r2": 2}
    local.forget("r2", now=150.0)
    assert local.look(prompt, [], 8, now=150.0).replicas == {}
    local.sent("r2", prompt[:3], now=151.0)  # it is back, or another one of its name is there
    assert depths(local.look(prompt, [], 8, now=152.0)) == {"r2": 3}


def test_it_knows_where_a_session_was() -> None:
    local, (session, other) = LocalView(LoadLedger()), chain("session", 2)
    local.sent("r1", [], now=0.0, session=session)
    view = local.look([], ["r3"], 8, now=1.0, session=session)
    assert (view.pinned, list(view.replicas)) == ("r1", ["r3", "r1"])
    assert local.look([], ["r3"], 8, now=1.0, session=other).pinned is None
    assert local.look([], ["r3"], 8, now=121.0, session=session).pinned is None


def test_it_keeps_so_many_blocks() -> None:
    local = LocalView(LoadLedger(), max_blocks=6)
    local.sent("r1", chain("a", 5), now=0.0)
    local.sent("r1", chain("b", 5), now=0.0)
    assert depths(local.look(chain("b", 5), [], 8, now=1.0)) == {"r1": 5}
    assert depths(local.look(chain("a", 5), [], 8, now=1.0)) == {}


def test_what_is_gone_is_not_kept() -> None:
    local, (block,) = LocalView(LoadLedger()), chain("a", 1)
    view = FleetView(replicas={name: ReplicaState(name, leased=True, prefill_rate=1.0) for name in ("r1", "r2")})
    local.remember(view, now=0.0)
    local.forget("r1", now=0.0)
    local.remember(view, now=1.0)  # Redis still speaks of it
    assert set(local._seen) == {"r2"}
    for number in range(20):
        local.sent(f"r{number}", [block], now=100.0 * number)
        local.sent("r0", [block], now=100.0 * number + 1)
    assert set(local._beliefs[block]) == {"r18", "r19", "r0"}
    assert depths(local.look([block], [], 8, now=1902.0)) == {"r18": 1, "r19": 1, "r0": 1}


def test_its_load_is_its_own_and_rates_are_those_last_seen() -> None:
    ledger = LoadLedger()
    local = LocalView(ledger)
    seen = ReplicaState("r1", leased=True, queued_tokens=9e9, in_flight=99, prefill_rate=123.0, kv_use=0.9)
    local.remember(FleetView(replicas={"r1": seen}), now=0.0)
    ledger.add(Reservation("r1", 100, 40, prefill_rate=1.0, sent_at=0.0))
    state = local.look([], ["r1"], 8, now=0.0).replicas["r1"]
    assert (state.queued_tokens, state.in_flight, state.prefill_rate, state.kv_use) == (40.0, 1, 123.0, None)
