"""The application on Ray Serve, as `outrider serve` starts it: HAProxy or Serve's proxy in front, replicas behind."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.gateway.fakes import chat, events
from tests.gateway.serve_process import ServeProcess, alive

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]
CHAT = "/v1/chat/completions"
LITTLE = {"num_cpus": 0.01}


def _model(name: str, num_replicas: int, delay_s: float, model: str = "echo") -> dict[str, object]:
    engine = {"kind": "echo", "model": model, "token_delay_s": delay_s}
    return {"name": name, "engine": engine, "num_replicas": num_replicas, "actor": LITTLE, "health_check_period_s": 1.0}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    models = [_model("echo", 1, 0.02), _model("slow", 2, 1.5)]
    process = ServeProcess(tmp_path_factory.mktemp("serve"), {"models": models, "ingress": {"actor": LITTLE}})
    yield process
    process.kill_all()


@pytest.fixture
def http(gateway: ServeProcess) -> Iterator[httpx.Client]:
    assert gateway.process.poll() is None, gateway.output
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        yield client


def _gauge(http: httpx.Client, name: str, model: str) -> float:
    sample = f'outrider_engine_{name}{{model="{model}"}} '
    return next(
        float(line.removeprefix(sample)) for line in http.get("/metrics").text.splitlines() if line.startswith(sample)
    )


def _until(condition: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_ready_line_has_the_url_and_a_curl(gateway: ServeProcess) -> None:
    ready = [line for line in gateway.output.splitlines() if line.startswith("Ready at")]
    assert len(ready) == 1
    assert gateway.url in ready[0]
    assert "curl -N" in ready[0]


def test_unary_and_stream(http: httpx.Client) -> None:
    whole = http.post(CHAT, json=chat(model="echo"), headers={"x-request-id": "mine"})
    assert whole.json()["choices"][0]["message"]["content"] == "user: hi"
    assert whole.headers.get_list("x-request-id") == ["mine"]
    assert whole.headers["x-outrider-config"] == http.get("/v1/models/echo").json()["config"]
    with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=20)) as answer:
        arrivals = [(time.monotonic(), part) for part in answer.iter_raw()]
    body = b"".join(part for _, part in arrivals).decode()
    assert events(body)[-1] == "[DONE]"
    # Twenty steps of 20 ms, passed on as they come and not in one piece at the end.
    assert arrivals[-1][0] - arrivals[0][0] > 0.2


def test_errors_pass_both_borders(http: httpx.Client) -> None:
    too_long = http.post(CHAT, json=chat(max_tokens=5000))
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    # Raised in the replica, read here: the engine's own words.
    forced = http.post(CHAT, json=chat(logit_bias={"65": 100}))
    assert (forced.status_code, forced.json()["error"]["param"]) == (400, "logit_bias")
    large = http.post(CHAT, content=b"x" * (8 * 2**20 + 1))
    assert large.status_code == 413


def test_leaving_a_stream_frees_the_sequence_in_the_replica(http: httpx.Client) -> None:
    with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=4000)) as answer:
        parts = answer.iter_raw()  # kept: httpx closes the connection with it
        next(parts)
        assert _gauge(http, "num_running", "echo") == 1
    _until(lambda: _gauge(http, "num_running", "echo") == 0, 5)
    assert _gauge(http, "num_aborted", "echo") == 1


def test_leaving_a_unary_call_frees_the_sequence_in_the_replica(http: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=chat(max_tokens=4000), timeout=1.0)
    _until(lambda: _gauge(http, "num_running", "echo") == 0, 5)
    assert _gauge(http, "num_aborted", "echo") == 2


def test_a_replica_lost_before_the_first_byte_is_retried_on_another(gateway: ServeProcess, http: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(http.post, CHAT, json=chat(model="slow", max_tokens=1)) for _ in range(8)]
        # Eight requests on two replicas, none of which says anything for 1.5 s.
        _until(lambda: _gauge(http, "num_running", "slow") == 8, 1.4)
        os.kill(gateway.replicas("engine-slow")[0], signal.SIGKILL)
        answers = [call.result() for call in calls]
    assert [answer.status_code for answer in answers] == [200] * 8


def test_a_replica_lost_in_the_middle_is_an_error_event_and_an_end(gateway: ServeProcess, http: httpx.Client) -> None:
    with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=4000)) as answer:
        parts = answer.iter_text()
        body = next(parts)
        os.kill(gateway.replicas("engine-echo")[0], signal.SIGKILL)
        body += "".join(parts)
    assert answer.status_code == 200
    payloads = events(body)
    assert json.loads(payloads[-2])["error"]["code"] == "engine_unavailable"
    assert payloads[-1] == "[DONE]"


def test_the_only_replica_gone_is_503_and_then_replaced(gateway: ServeProcess, http: httpx.Client) -> None:
    _until(lambda: http.post(CHAT, json=chat()).status_code == 200, 60)
    killed = gateway.replicas("engine-echo")
    os.kill(killed[0], signal.SIGKILL)
    _until(lambda: set(gateway.replicas("engine-echo")) - set(killed))
    (starting,) = set(gateway.replicas("engine-echo")) - set(killed)
    os.kill(starting, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        refused = http.post(CHAT, json=chat())
        assert time.monotonic() - began_s < 10
    finally:
        os.kill(starting, signal.SIGCONT)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert refused.headers["retry-after"]
    _until(lambda: http.post(CHAT, json=chat()).status_code == 200, 60)
    _until(lambda: http.get("/ready").status_code == 200)


def test_ctrl_c_stops_everything(gateway: ServeProcess) -> None:
    below = gateway.descendants()
    scratch = {part for name in below.values() for part in name.split() if part.startswith("/tmp/outrider-")}
    assert len(below) > 5
    assert gateway.stop(signal.SIGINT) == 0
    _until(lambda: not [name for pid, name in below.items() if alive(pid)], 10)
    assert gateway.output.rstrip().endswith("Stopped.")
    assert not any(Path(*Path(path).parts[:3]).exists() for path in scratch)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", gateway.port))


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    args = {"models": [_model("echo", 1, 0.0, model=str(tmp_path / "no-tokenizer"))], "ingress": {"actor": LITTLE}}
    process = ServeProcess(tmp_path, args)
    try:
        assert process.process.wait(60) == 1
        assert "Traceback" not in process.output
        assert "no-tokenizer" in process.output.splitlines()[-1]
    finally:
        process.kill_all()
