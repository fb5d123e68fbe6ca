"""Our own engine behind the whole gateway, asked by the official client; beside it a model whose peer is away."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import openai
import pytest

from tests.engines.tiny_models import SUPPORTED, save
from tests.engines.tokenizers import character_tokenizer
from tests.gateway.serve_process import ServeProcess

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]
LITTLE = {"num_cpus": 0.01}
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello there"}]
PROMPT = "user: hello there\nassistant: "
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


class _Peer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "far"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def peer() -> Iterator[HTTPServer]:
    """Has its port, but does not listen yet."""
    server = HTTPServer(("127.0.0.1", 0), _Peer, bind_and_activate=False)
    server.server_bind()
    yield server
    server.server_close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, peer: HTTPServer) -> Iterator[ServeProcess]:
    folder = save(SUPPORTED["llama"](), tmp_path_factory.mktemp("tiny"))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    local = {"kind": "local", "model": str(folder), "device": "cpu", "kv_cache_bytes": 2**20, "num_threads": 1}
    # Always eight: whether drafting pays on this machine is another test's matter.
    local |= {"drafter": {"kind": "auto", "draft_length": 8}, "costs_file": ""}
    remote = {"kind": "remote", "base_url": f"http://127.0.0.1:{peer.server_port}/v1", "model": "far"}
    models = [
        {"name": "tiny", "engine": local, "actor": LITTLE},
        {"name": "far", "engine": remote, "actor": LITTLE, "health_check_period_s": 0.2},
    ]
    args = {"models": models, "ingress": {"actor": LITTLE}}
    process = ServeProcess(tmp_path_factory.mktemp("serve"), args, until_ready=False)
    try:
        _until(lambda: process.process.poll() is not None or "tiny" in _models(process.url), 90)
        yield process
    finally:
        process.kill_all()


@pytest.fixture
def client(gateway: ServeProcess) -> Iterator[openai.OpenAI]:
    assert gateway.process.poll() is None, gateway.output
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def _models(url: str) -> list[str]:
    try:
        answer = httpx.get(f"{url}/v1/models")
        return [model["id"] for model in answer.json()["data"]] if answer.status_code == 200 else []
    except httpx.HTTPError:
        return []


def _gauge(gateway: ServeProcess, name: str) -> float:
    sample = f'outrider_engine_{name}{{model="tiny"}} '
    lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
    return next(float(line.removeprefix(sample)) for line in lines if line.startswith(sample))


def _until(condition: object, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 24)
    said = whole.choices[0].message.content
    assert said is not None
    assert len(said) == 24
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said


def test_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, n=2, seed=7, logprobs=True, top_logprobs=2, temperature=1.0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert "".join(entry.token for entry in entries) == choice.message.content
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)


def test_a_prediction_travels_to_the_engine_and_who_drafted_what_comes_back(
    gateway: ServeProcess, client: openai.OpenAI
) -> None:
    plain = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, temperature=0,
        extra_body={"ignore_eos": True, "speculation": {"drafter": "none"}},
    )  # fmt: skip
    said = plain.choices[0].message.content
    assert said is not None
    speculation = {"drafter": "prediction", "provenance": True}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, prediction={"type": "content", "content": said},
        extra_body={"ignore_eos": True, "speculation": speculation},
    )  # fmt: skip
    assert answer.choices[0].message.content == said
    told = (answer.choices[0].model_extra or {})["provenance"]
    assert "".join(piece["text"] for piece in told) == said
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens
    assert details.accepted_prediction_tokens == sum(piece["source"] == "prediction" for piece in told)
    counter = 'outrider_engine_accepted_draft_tokens_total{drafter="prediction",model="tiny"} '
    page = httpx.get(f"{gateway.url}/metrics").text
    counted = next(line for line in page.splitlines() if line.startswith(counter)).removeprefix(counter)
    assert float(counted) == details.accepted_prediction_tokens


def test_a_drafter_that_the_engine_lacks_is_named_across_processes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=4, extra_body={"speculation": {"drafter": "model"}}
        )
    assert refused.value.param == "speculation.drafter"


def test_leaving_a_stream_gives_its_blocks_back(gateway: ServeProcess, client: openai.OpenAI) -> None:
    before = _gauge(gateway, "num_aborted")
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert _gauge(gateway, "num_blocks_used") > 0
    stream.close()
    _until(lambda: _gauge(gateway, "num_aborted") == before + 1)
    assert _gauge(gateway, "num_running") == 0
    assert _gauge(gateway, "num_blocks_total") > 0
    assert _gauge(gateway, "num_blocks_used") == 0


def test_an_absent_peer_stops_nobody_else_and_is_found_when_it_comes(gateway: ServeProcess, peer: HTTPServer) -> None:
    replicas = gateway.replicas("engine-far")
    assert len(replicas) == 1
    ready = httpx.get(f"{gateway.url}/ready")
    assert ready.status_code == 503
    assert list(ready.json()["models"]) == ["far"]
    peer.server_activate()
    threading.Thread(target=peer.serve_forever, daemon=True).start()
    try:
        _until(lambda: httpx.get(f"{gateway.url}/ready").status_code == 200, 20)
    finally:
        peer.shutdown()
    # Serve's health checks have not replaced what they could not mend.
    assert gateway.replicas("engine-far") == replicas
