"""From an engine's configuration to the engine."""

from __future__ import annotations

from typing import assert_never

from engines.config import EchoEngineConfig, EngineConfig, LocalEngineConfig, RemoteEngineConfig
from engines.protocol import Engine


def make_engine(config: EngineConfig) -> Engine:
    """An engine of the configured kind, not started. Imports that kind alone: an ingress process needs no torch."""
    match config:
        case LocalEngineConfig():
            from engines.local import LocalEngine

            return LocalEngine(config)
        case RemoteEngineConfig():
            from engines.remote import RemoteEngine

            return RemoteEngine(config)
        case EchoEngineConfig():
            from engines.echo import EchoEngine

            return EchoEngine(config)
        case _:
            assert_never(config)
