"""`auto` on the fleet that `make run` starts: its own engines and routers in real processes, all of it over HTTP."""

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from gateway.cli import app
from router_models.artifact import DEFAULT
from router_models.logs import OPEN_SUFFIX, read_log
from router_models.records import RequestRecord
from tests.gateway.auto_world import damaged, version_of
from tests.gateway.serve_process import ROOT, ServeProcess

pytestmark = [pytest.mark.serve, pytest.mark.timeout(420)]
WEAK, STRONG = "outrider-demo-mid", "outrider-demo"
LITTLE = {"num_cpus": 0.01}
NUM_ASKING = 4
MAX_TOKENS = 12
PROMPTS = (
    "Hello!",
    "What does len do?",
    "What is the capital of France?",
    "Translate 'good morning' into Spanish.",
    "Which is larger, 9.11 or 9.9?",
    "Why is the sky blue, and why are sunsets red?",
    "Write a haiku about autumn leaves on a river.",
    "Write a Python function that merges two sorted lists without using sort().",
    "Find the error:\n\n```python\ndef mean(xs):\n    return sum(xs) / len(x)\n```",
    "Explain the difference between a thread and a process to a ten-year-old, in at most three sentences.",
    "A train leaves at 14:05 and travels 210 km at 84 km/h. When does it arrive? Show every step.",
    "Prove that the square root of 2 is irrational, then say which step fails for the square root of 4.",
    "Let $f(x) = x^3 - 3x + 1$. Find all real roots to four decimals and justify that there are no others.",
    "Which of these is a mammal?\nA. Trout\nB. Bat\nC. Gecko\nD. Wren\nAnswer:",
    "A patient with type 2 diabetes and stage 4 kidney disease takes metformin. Which of these is the best change?\n"
    "A. Double the dose\nB. Stop it and start a DPP-4 inhibitor\nC. Add a second biguanide\nD. No change\nAnswer:",
    "Under the rule in Hadley v. Baxendale, which losses may the buyer claim if the seller did not know of the resale? "
    "Compare with the position under the CISG, and cite the articles.",
)


class Fleet(ServeProcess):
    """configs/demo.yaml with folders of its own, the cheaper model twice, and log files of a few requests each."""

    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))
        args = config["applications"][0]["args"]
        self.artifacts, self.log = folder / "artifacts", folder / "log"
        for model in args["models"]:
            model |= {"actor": LITTLE, "num_replicas": 2 if model["name"] == WEAK else 1}
        args["ingress"] = {"actor": LITTLE}
        # A busy machine must not turn decisions into fallbacks.
        args["auto"] |= {"artifact_folder": str(self.artifacts), "watch_period_s": 0.2, "decision_timeout_s": 30.0}
        args["request_log"] |= {"folder": str(self.log), "max_file_bytes": 16_384}
        super().__init__(folder, args, wait_s=240.0)
        assert self.process.poll() is None, self.output
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, prompt: str, max_tokens: int = MAX_TOKENS, **more: object) -> "Answer":
        """The whole answer to a chat of one message."""
        raw = self.client.chat.completions.with_raw_response.create(
            model="auto",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"receipt": True} | more,
        )
        found = raw.parse()
        choice = found.choices[0]
        return Answer(
            raw.headers["x-request-id"], found.model, choice.message.content, choice.finish_reason, _receipt(found)
        )

    def stream(self, prompt: str, **more: object) -> "Answer":
        """The same, streamed."""
        text, finish, model, receipt = "", None, "", None
        for chunk in self.client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"receipt": True} | more,
        ):
            model, receipt = chunk.model, _receipt(chunk)
            for choice in chunk.choices:
                text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
        assert receipt is not None, "the last chunk has it"
        return Answer(receipt["id"], model, text, finish, receipt)

    def status(self) -> dict[str, Any]:
        """Of the router that serves."""
        found: dict[str, Any] = httpx.get(f"{self.url}/v1/router").json()["auto"]
        return found

    def switch(self, *arguments: object) -> str:
        """The version that promote or rollback says is served."""
        result = _outrider(*arguments, "--folder", self.artifacts, "--url", self.url, "--wait", 60, "--json")
        assert result.exit_code == 0, result.stderr
        version: str = json.loads(result.stdout)["version"]
        return version

    def records(self, request_ids: set[str]) -> dict[str, RequestRecord]:
        """The log's records of these requests, once all are written."""
        _until(lambda: self.log.is_dir() and request_ids <= read_log(self.log).requests.keys())
        found = read_log(self.log).requests
        return {request_id: found[request_id] for request_id in request_ids}


@dataclass(frozen=True)
class Answer:
    request_id: str
    model: str
    text: str | None
    finish_reason: str | None
    receipt: dict[str, Any] | None

    @property
    def choice(self) -> dict[str, Any]:
        """The receipt's section "model"."""
        assert self.receipt is not None
        section: dict[str, Any] = self.receipt["model"]
        return section


def _outrider(*arguments: object) -> Result:
    """The command, in this process: its own start takes seconds."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _receipt(found: Any) -> dict[str, Any] | None:
    extra = found.model_extra or {}
    return extra.get("receipt")


def _until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    process = Fleet(tmp_path_factory.mktemp("auto"))
    yield process
    try:
        assert process.stop() == 0
    finally:
        process.kill_all()


@contextmanager
def _load(fleet: Fleet) -> Iterator[list[Answer]]:
    """Several clients that ask without a pause, every other request streamed; an error in one of them is raised."""
    is_over, answers = threading.Event(), list[Answer]()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        while not is_over.is_set():
            ask = draw.choice((fleet.ask, fleet.stream))
            answers.append(ask(draw.choice(PROMPTS), quality=draw.choice((0.0, 0.5, 1.0))))

    with ThreadPoolExecutor(NUM_ASKING) as pool:
        working = [pool.submit(work, seed) for seed in range(NUM_ASKING)]
        try:
            yield answers
        finally:
            is_over.set()
    for one in working:
        one.result()


def test_a_receipt_shows_the_choice_of_a_model_and_then_of_its_replica(fleet: Fleet) -> None:
    assert "auto" in [model.id for model in fleet.client.models.list()]
    for quality, model in ((0.0, WEAK), (1.0, STRONG)):
        answer = fleet.ask("What does len do?", quality=quality)
        assert (answer.model, answer.choice["asked"], answer.choice["chosen"]) == (model, "auto", model)
        assert answer.text
        assert [candidate["model"] for candidate in answer.choice["candidates"]] == [WEAK, STRONG]
    answer = fleet.ask("What does len do?", quality=0.0)
    assert answer.receipt is not None
    sections = list(answer.receipt)
    assert sections.index("model") < sections.index("replica")
    (chosen,) = answer.receipt["replica"]["prompts"]
    assert len(chosen["candidates"]) == 2
    assert chosen["chosen"] in [candidate["replica"] for candidate in chosen["candidates"]]


def test_the_dial_moves_the_share_of_the_strong_model_monotonically(fleet: Fleet) -> None:
    dial = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    strong = dict.fromkeys(dial, 0)
    for prompt in 4 * PROMPTS:
        fleet.ask(prompt, max_tokens=1)  # until the operator's own share has found its threshold for them
    for prompt in PROMPTS:
        for quality in dial:
            answer = fleet.ask(prompt, max_tokens=1, quality=quality)
            assert answer.model == answer.choice["chosen"]
            # What the policy takes where it does not explore, as the demo's does with one request in fifty.
            strong[quality] += answer.choice["preferred"] == STRONG
    counts = list(strong.values())
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(PROMPTS))
    assert len(set(counts)) > 3, "a dial, not a switch"


def test_promotion_and_rollback_under_load_lose_no_request(fleet: Fleet, router: Path) -> None:
    first, second = version_of(DEFAULT), version_of(router)
    assert fleet.switch("promote", "default") == first
    with _load(fleet) as answers:
        for expected, command in ((second, ("promote", router)), (first, ("rollback",))):
            assert fleet.switch(*command) == expected
            num_before = len(answers)
            _until(lambda n=num_before: len(answers) > n + 2 * NUM_ASKING)
            assert answers[-1].choice["artifact"] == expected
    assert {answer.choice["artifact"] for answer in answers} == {first, second}
    assert len({answer.request_id for answer in answers}) == len(answers)
    records = fleet.records({answer.request_id for answer in answers})
    for answer in answers:
        record = records[answer.request_id]
        assert record.decision is not None
        assert record.use is not None
        assert record.decision.artifact == answer.choice["artifact"]
        assert (record.use.model, record.use.finish_reason) == (answer.model, answer.finish_reason)
        assert record.use.output_tokens == MAX_TOKENS or answer.finish_reason == "stop"
        drafted = [(counts.num_drafted, counts.num_accepted) for counts in record.use.drafters.values()]
        assert tuple(map(sum, zip((0, 0), *drafted, strict=True))) == (record.use.num_drafted, record.use.num_accepted)


def test_a_corrupt_router_leaves_the_old_one_serving_with_a_clear_error(
    fleet: Fleet, other_router: Path, tmp_path: Path
) -> None:
    before, bad = fleet.status()["artifact"], damaged(other_router, tmp_path / "damaged")
    refused = _outrider("promote", bad, "--folder", fleet.artifacts, "--url", fleet.url)
    assert (refused.exit_code, f"{bad}/arrays.npz does not match its checksum" in refused.stderr) == (1, True)
    assert fleet.status()["error"] is None
    # Past the command's own checks: on a shared disk that damages what was promoted.
    version = version_of(other_router)
    place = fleet.artifacts / "versions" / version
    shutil.copytree(bad, place)
    (fleet.artifacts / "current").write_text(json.dumps({"version": version, "history": [before]}))
    _until(lambda: fleet.status()["error"] is not None)
    assert fleet.status()["error"] == f"{place}/arrays.npz does not match its checksum"
    assert (fleet.status()["artifact"], fleet.ask("Hello!").choice["artifact"]) == (before, before)
    assert fleet.switch("rollback") == before


def test_feedback_finds_its_record_after_the_log_was_rotated(fleet: Fleet, tmp_path: Path) -> None:
    asked = fleet.ask(PROMPTS[1], quality=1.0)
    fleet.records({asked.request_id})

    def is_rotated() -> bool:
        fleet.ask("Hello!", quality=0.0)
        paths = [path for path in fleet.log.iterdir() if path.name.endswith(OPEN_SUFFIX)]
        return all(asked.request_id not in path.read_text() for path in paths)

    _until(is_rotated)
    told = httpx.post(f"{fleet.url}/v1/feedback", json={"request_id": asked.request_id, "score": 0.75})
    assert (told.status_code, told.json()["status"]) == (200, "stored")
    log = read_log(fleet.log)
    assert log.results == {asked.request_id: {STRONG: 0.75}}
    assert log.summary.orphans == 0
    policy = tmp_path / "policy.yaml"
    policy.write_text("goal: {kind: price, regret_usd: 1}\n")
    result = _outrider("replay", fleet.log, "--policy", policy, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_outcomes"] == 1
