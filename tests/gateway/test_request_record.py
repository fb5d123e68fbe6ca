"""Records of finished requests."""

import json

import pytest
from prometheus_client import CollectorRegistry

from engines.types import DraftCounts, Usage
from gateway.config import GatewayConfig
from gateway.openai import ChatCompletionRequest, CompletionRequest
from gateway.request_log_config import RequestLogConfig
from gateway.request_record import RecordMaker, ServedRequest, logged_prompt
from gateway.router_metrics import RouterMetrics
from gateway.trace import CLIENT_LEFT, FinishedRequest
from router_models.prompt import Turn
from tests.gateway.auto_world import auto_fields
from tests.gateway.fakes import chat, completion


def _maker(prompt: str = "off", **more: object) -> RecordMaker:
    names = ("weak", "strong")
    models = [{"name": name, "engine": {"kind": "echo"}} for name in names]
    config = GatewayConfig.model_validate({"models": models, "auto": auto_fields("default")})
    log = RequestLogConfig.model_validate({"folder": "x", "prompt": prompt, "source": "chats"} | more)
    return RecordMaker(config, log, b"key", RouterMetrics("test", CollectorRegistry()))


def _finished(model: str | None = "strong", status: int = 200, **fields: object) -> FinishedRequest:
    first, second = DraftCounts(5, 4), DraftCounts(3, 2)
    usages = (
        Usage(100, 9, 0, 6, 2, {"ngram": first, "model": second}),
        Usage(100, 12, 0, 4, 4, {"model": DraftCounts(8, 4)}),
    )
    defaults: dict[str, object] = {
        "status": status,
        "error": None,
        "model": model,
        "prompt_tokens": 100,
        "completion_tokens": 21,
        "ttft_s": 0.5,
        "e2e_s": 2.5,
        "finish_reasons": ("stop", "length"),
        "usages": usages,
    }
    return FinishedRequest(**(defaults | fields))  # type: ignore[arg-type]


def _served(finished: FinishedRequest, **fields: object) -> ServedRequest:
    request = ChatCompletionRequest.model_validate_json(json.dumps(chat(**fields)))
    return ServedRequest("id-1", 12.5, request, None, finished)


def test_a_record_tells_what_the_request_took() -> None:
    record = _maker().make(_served(_finished(), cache_salt="bank"))
    assert (record.request_id, record.time, record.source, record.max_tokens) == ("id-1", 12.5, "chats", 8)
    assert record.tenant is not None
    assert "bank" not in record.model_dump_json()
    assert record.prompt is None
    assert record.decision is None
    use = record.use
    assert use is not None
    assert (use.model, use.input_tokens, use.output_tokens) == ("strong", 100, 21)
    assert (use.ttft_s, use.tpot_s) == (0.5, pytest.approx(0.1))
    assert use.cost_usd == pytest.approx((100 * 10 + 21 * 40) / 1e6)
    assert use.finish_reason == "stop"


def test_accepted_drafts_are_there_to_learn_from() -> None:
    use = _maker().make(_served(_finished())).use
    assert use is not None
    assert (use.num_drafted, use.num_accepted) == (16, 10)
    assert {name: (counts.num_drafted, counts.num_accepted) for name, counts in use.drafters.items()} == {
        "ngram": (5, 4),
        "model": (11, 6),
    }
    assert use.acceptance == pytest.approx(10 / 16)
    plain = _maker().make(_served(_finished(usages=()))).use
    assert plain is not None
    assert (plain.drafters, plain.acceptance) == ({}, None)


@pytest.mark.parametrize(("status", "reason"), [(CLIENT_LEFT, "abort"), (503, "error"), (200, "stop")])
def test_how_it_ended(status: int, reason: str) -> None:
    use = _maker().make(_served(_finished(status=status))).use
    assert use is not None
    assert use.finish_reason == reason


def test_a_request_that_found_no_model_used_nothing() -> None:
    assert _maker().make(_served(_finished(None, 503))).use is None


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    use = _maker().make(_served(_finished(completion_tokens=1))).use
    assert use is not None
    assert use.tpot_s is None


def test_prompts_are_kept_as_far_as_the_operator_wants() -> None:
    turns = [Turn("system", "be brief"), Turn("user", "mail a@b.org")]
    assert logged_prompt(turns, "off", b"k") is None
    full, redacted = logged_prompt(turns, "full", b"k"), logged_prompt(turns, "redacted", b"k")
    assert full is not None
    assert redacted is not None
    assert [(turn.role, turn.text) for turn in full.turns] == [("system", "be brief"), ("user", "mail a@b.org")]
    assert [turn.text for turn in redacted.turns] == ["be brief", "mail [email]"]


def test_hashed_prompts_can_be_compared_and_not_read() -> None:
    turns = [Turn("user", "secret")]
    first, again = (logged_prompt(turns, "hashed", b"k") for _ in range(2))
    assert first is not None
    assert (first, first.turns) == (again, ())
    assert first != logged_prompt(turns, "hashed", b"other key")
    assert first != logged_prompt([Turn("user", "secre")], "hashed", b"k")


def test_token_ids_are_no_text() -> None:
    request = CompletionRequest.model_validate(completion(prompt=(1, 2)))
    record = _maker("full").make(ServedRequest("id", 0.0, request, None, _finished()))
    assert record.prompt is None


def test_raw_text_is() -> None:
    request = CompletionRequest.model_validate(completion(prompt="abc"))
    record = _maker("full").make(ServedRequest("id", 0.0, request, None, _finished()))
    assert record.prompt is not None
    assert record.prompt.turns[0].text == "abc"


def test_a_domain_is_what_the_operator_has_clients_name_it() -> None:
    served = _served(_finished(), metadata={"team": "law", "other": "x"})
    assert _maker(subset_key="team").make(served).subset == "law"
    assert [_maker().make(served).subset, _maker(subset_key="none").make(served).subset] == ["", ""]
    plain = CompletionRequest.model_validate(completion(prompt="abc"))
    assert _maker(subset_key="team").make(ServedRequest("id", 0.0, plain, None, _finished())).subset == ""
