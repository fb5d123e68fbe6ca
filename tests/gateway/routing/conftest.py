"""The state's own fixtures: an embedded Redis, and a clock that only tests move."""

from tests.gateway.state.conftest import client, clock, config, server

__all__ = ["client", "clock", "config", "server"]
