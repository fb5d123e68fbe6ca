"""What can be known about `auto` before anything serves: its routers, the names it gives models there, its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.auto_config import AutoConfig
from gateway.errors import ConfigError
from router_models.errors import RouterError

if TYPE_CHECKING:
    from router_models.router import Router


def check_auto(config: AutoConfig) -> None:
    """Raises ConfigError for a router that cannot be loaded or does not know what the configuration names."""
    from gateway.auto.live_router import LiveRouter
    from router_models.artifact import load, resolve  # scikit-learn takes a second to import

    for field in ("artifact", "shadow"):
        name = getattr(config, field)
        if name is None:
            continue
        try:
            artifact = load(resolve(name).expanduser())
            _check_names(artifact.router, config, name)
            LiveRouter(artifact, config)
        except RouterError as error:
            raise ConfigError(f"auto.{field}: {error.message}") from error


def _check_names(router: Router, config: AutoConfig, name: str) -> None:
    known = {ability for expert in router.experts for ability in expert.abilities}
    for candidate in config.candidates:
        # A name that is not given is the served model's own, which a router learns from this gateway's log.
        if candidate.ability is not None and candidate.ability not in known:
            raise ConfigError(f"auto.candidates: {name} knows no {candidate.ability}; it knows {_some(known)}")


def _some(names: set[str], most: int = 12) -> str:
    shown = sorted(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
