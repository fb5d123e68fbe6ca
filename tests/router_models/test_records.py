import pytest
from pydantic import TypeAdapter, ValidationError

from router_models.records import LoggedCandidate, LoggedDecision, LoggedUse, PreferenceRecord, Record, RequestRecord

_ADAPTER: TypeAdapter[Record] = TypeAdapter(Record)


def _decision(**changes: object) -> LoggedDecision:
    fields = {
        "policy": "default",
        "artifact": "abc",
        "feature_version": 1,
        "candidates": (LoggedCandidate(model="m", prob_right=0.5, cost_usd=0.1),),
        "choice": "m",
        "propensity": 0.99,
        "mechanism": "model",
    }
    return LoggedDecision.model_validate(fields | changes)


def test_records_of_all_kinds_come_back_as_they_were() -> None:
    record = RequestRecord(request_id="1", time=1.5, decision=_decision(), features={"log_chars": 2.0})
    assert _ADAPTER.validate_json(record.model_dump_json()) == record
    preference = PreferenceRecord(request_id="1", time=2, first="a", second="b", preferred="tie")
    assert _ADAPTER.validate_json(preference.model_dump_json()) == preference


@pytest.mark.parametrize(
    "changes",
    [{"propensity": 0.0}, {"propensity": 1.1}, {"novelty": 2.0}, {"unknown": 1}, {"score": float("nan")}],
)
def test_impossible_decisions_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _decision(**changes)


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(ValidationError):
        _ADAPTER.validate_python({"kind": "request", "version": 3, "request_id": "1", "time": 0})


def test_a_request_of_version_1_is_read() -> None:
    use = {"model": "m", "input_tokens": 1, "output_tokens": 9, "num_drafted": 8, "num_accepted": 6}
    old = {"version": 1, "request_id": "1", "time": 0, "num_tools": 0, "response_format": "text"}
    found = _ADAPTER.validate_python({"kind": "request", "use": use | {"drafter": "auto"}} | old)
    assert found == RequestRecord(request_id="1", time=0, use=LoggedUse.model_validate(use))


@pytest.mark.parametrize("fields", [{"version": 2, "num_tools": 0}, {"version": 1, "num_tools": 1}])
def test_what_a_version_cannot_have_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        _ADAPTER.validate_python({"kind": "request", "request_id": "1", "time": 0} | fields)


def test_acceptance_is_a_share_of_what_was_drafted() -> None:
    use = LoggedUse(model="m", input_tokens=1, output_tokens=9, num_drafted=8, num_accepted=6)
    assert use.acceptance == 0.75
    assert LoggedUse(model="m", input_tokens=1, output_tokens=9).acceptance is None
