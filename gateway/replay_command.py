"""`outrider replay`: recorded choices of models made again by another policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from gateway.tenant_digest import KEY_FILE, tenant_digest
from router_models.errors import DataError, PolicyError, RouterError
from router_models.policy_config import PolicyConfig

if TYPE_CHECKING:
    from router_models.off_policy import Estimate
    from router_models.replay import Replay
    from router_models.rescore import Rescorer

_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def replay(
    logs: Annotated[Path, typer.Argument(help="request logs: a file, or a gateway's folder of them")],
    policy: Annotated[Path, typer.Option(help="the other policy: YAML, as under auto.policy")],
    router: Annotated[
        str | None, typer.Option(help="an artifact that scores the requests: a folder, or default; else as logged")
    ] = None,
    ability: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=NAME", help="that artifact's name of a model, if it is another")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="of the intervals")] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Estimate what another policy, or another router, would have cost and been worth on recorded traffic."""
    try:
        from router_models.logs import read_log
        from router_models.replay import replay as replayed

        other = _with_digests(_read_policy(policy), logs)
        rescorer = _rescorer(router, ability or [])
        found = replayed(read_log(logs), other, confidence, rescorer)
    except RouterError as error:
        _errors.print(error.message, style="red", markup=False)
        raise typer.Exit(1) from error
    if as_json:
        scored = None if rescorer is None else {"artifact": router, "num_seen": rescorer.num_seen}
        typer.echo(json.dumps({"logs": str(logs), "policy": str(policy), "router": scored, **found.document()}))
    else:
        _show(found)
    if rescorer is not None:
        _warn(rescorer)


def _rescorer(router: str | None, abilities: list[str]) -> Rescorer | None:
    """None where the logged scores count. Raises ArtifactError, PolicyError."""
    pairs = [ability.partition("=") for ability in abilities]
    for model, _, name in pairs:
        if not (model and name):
            raise PolicyError("--ability is to be MODEL=NAME")
    if router is None:
        if pairs:
            raise PolicyError("--ability has no effect without --router")
        return None
    from router_models import artifact
    from router_models.rescore import Rescorer

    return Rescorer(artifact.load(artifact.resolve(router)), {model: name for model, _, name in pairs})


def _warn(rescorer: Rescorer) -> None:
    if rescorer.is_stand_in:
        _errors.print("The router does not know the cheapest and the strongest model: typical ones stand in for them.")
    if rescorer.num_seen:
        _errors.print(f"{rescorer.num_seen} of the requests taught this router: their estimates flatter it.")


def _read_policy(path: Path) -> PolicyConfig:
    try:
        return PolicyConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "the whole file"
        raise PolicyError(f"{path}: {place}: {detail['msg'].removeprefix('Value error, ')}") from error


def _with_digests(policy: PolicyConfig, logs: Path) -> PolicyConfig:
    """The policy with its tenants named as the log names them. Raises DataError if its key is not beside it."""
    if not policy.floors and not policy.step_down_tenants:
        return policy
    path = (logs if logs.is_dir() else logs.parent) / KEY_FILE
    try:
        key = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; the policy's tenants cannot be found in the log without it"
        ) from error
    return policy.model_copy(
        update={
            "floors": {tenant_digest(key, tenant): model for tenant, model in policy.floors.items()},
            "step_down_tenants": tuple(tenant_digest(key, tenant) for tenant in policy.step_down_tenants),
        }
    )


def _show(found: Replay) -> None:
    table = Table(title=f"{found.num_rows} choices, {found.num_outcomes} with an outcome")
    for name in ("", "quality", f"{found.confidence:.0%} interval", "USD per 1,000", "strongest"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    rows: list[tuple[str, Estimate | None, float, float]] = [
        ("as logged", found.logged_quality, found.logged.cost_usd, found.logged.strong_share),
        ("replayed: IPS", found.replayed.ips, found.replayed.cost_usd, found.replayed.strong_share),
        ("replayed: doubly robust", found.replayed.doubly_robust, *_cost(found)),
    ]
    for name, estimate, cost_usd, share in rows:
        value, interval = ("", "") if estimate is None else _told(estimate)
        table.add_row(name, value, interval, f"{1000 * cost_usd:.4f}", f"{share:.1%}")
    _console.print(table)
    for (old, new), count in sorted(found.changes.items()):
        if old != new:
            _console.print(f"{old} -> {new}: {count} ({count / found.num_rows:.1%})", markup=False)
    if found.num_left_out:
        _console.print(
            f"{found.num_left_out} left out: the other policy allows none of their candidates, or the log has not kept "
            "what a router reads."
        )
    if found.refusal is not None:
        _console.print(f"No estimate: {found.refusal}.", markup=False)


def _cost(found: Replay) -> tuple[float, float]:
    return found.replayed.cost_usd, found.replayed.strong_share


def _told(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}"
