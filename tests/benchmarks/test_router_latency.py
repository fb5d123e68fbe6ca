"""The cost of a decision, and whether it was the router's."""

from pathlib import Path

import pytest

from benchmarks.router_latency import _config, _measure
from gateway.config import GatewayConfig


@pytest.mark.parametrize(("timeout_s", "is_scored"), [(30.0, True), (1e-9, False)])
async def test_decisions_that_the_router_was_too_slow_for_are_told(
    timeout_s: float, is_scored: bool, tmp_path: Path
) -> None:
    config = _config("default", tmp_path).model_dump()
    config["auto"]["decision_timeout_s"] = timeout_s
    found, _ = await _measure(GatewayConfig.model_validate(config), ["Why is the sky blue?"] * 20, 100.0, seed=0)
    assert [decision.is_scored for decision in found] == [is_scored] * 20
    assert all(decision.taken_s > 0 for decision in found)
