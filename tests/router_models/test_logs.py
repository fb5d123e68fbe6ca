import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PosixPath

import pytest

from router_models.data import digest
from router_models.errors import DataError
from router_models.features import FEATURE_VERSION, extract
from router_models.logs import as_groups, prompt_of, read, read_log
from router_models.prompt import Prompt
from router_models.records import (
    LoggedDecision,
    LoggedPrompt,
    LoggedTurn,
    LoggedUse,
    OutcomeRecord,
    PreferenceRecord,
    RequestRecord,
)
from router_models.structure import FEATURE_NAMES, structure


def _request(number: int, text: str | None = "how are you?", **fields: object) -> RequestRecord:
    prompt = None if text is None else LoggedPrompt(kind="full", turns=(LoggedTurn(role="user", text=text),))
    use = LoggedUse(model="small", input_tokens=5, output_tokens=9)
    return RequestRecord(request_id=str(number), time=number, prompt=prompt, use=use, **fields)  # type: ignore[arg-type]


def _decision(version: int = FEATURE_VERSION) -> LoggedDecision:
    return LoggedDecision(
        policy="p",
        artifact="a",
        feature_version=version,
        candidates=(),
        choice="small",
        propensity=1.0,
        mechanism="model",
    )


def _outcome(number: int, score: float, time: float = 100, model: str | None = None) -> OutcomeRecord:
    return OutcomeRecord(request_id=str(number), time=time, label="feedback", score=score, model=model)


def _write(path: Path, *records: RequestRecord | OutcomeRecord | PreferenceRecord) -> Path:
    lines = "".join(record.model_dump_json() + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def test_feedback_finds_its_request_in_another_file(tmp_path: Path) -> None:
    _write(tmp_path / "1.jsonl.gz", _request(1, max_tokens=50), _request(2))
    _write(tmp_path / "2.jsonl", _outcome(1, 1.0), _outcome(2, 0.0), _outcome(2, 1.0, model="large"))
    group = read(tmp_path)[0]
    assert group.models == ("large", "small")
    assert group.of("small").tolist() == [1.0, 0.0]
    assert group.of("large")[1] == 1.0
    assert group.prompts[0].max_tokens == 50


def test_the_later_of_two_outcomes_counts(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _outcome(1, 0.0, time=9), _outcome(1, 1.0, time=3), _request(1))
    assert read(path)[0].of("small").tolist() == [0.0]


def test_preferences_become_a_gap_and_ties_none(tmp_path: Path) -> None:
    def preference(number: int, preferred: str) -> PreferenceRecord:
        return PreferenceRecord(request_id=str(number), time=1, first="a", second="b", preferred=preferred)  # type: ignore[arg-type]

    requests = [_request(i) for i in range(3)]
    path = _write(tmp_path / "a.jsonl", *requests, *map(preference, range(3), ("first", "second", "tie")))
    group = read(path)[0]
    assert (group.of("a") - group.of("b")).tolist() == [1.0, -1.0, 0.0]


def test_what_cannot_be_learnt_from_is_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _request(1), _request(2, text=None), _outcome(2, 1.0), _outcome(9, 1.0))
    log = read_log(path)
    assert as_groups(log) == []
    summary = log.summary
    assert (summary.requests, summary.without_prompt, summary.without_outcome, summary.orphans) == (2, 1, 1, 1)
    with pytest.raises(DataError, match=r"2 requests 1 are without an outcome and 1 without text or features"):
        read(path)


def test_features_count_as_they_were_served() -> None:
    served = Prompt.from_text("Mail ada@example.org the 20 results.")
    features = {name: float(value) for name, value in structure(served).items()}
    kept = prompt_of(_request(1, "Mail [email] the 20 results.", features=features, decision=_decision()))
    gone = prompt_of(_request(1, None, features=features, decision=_decision()))
    assert kept is not None
    assert gone is not None
    found = extract([served, kept, gone])
    assert (found.structure == found.structure[0]).all()
    assert (kept.text, gone.text) == ("Mail [email] the 20 results.", "")
    assert len({digest(gone), digest(replace(gone, structure=(1.0,)))}) == 2


@pytest.mark.parametrize(("version", "names"), [(FEATURE_VERSION + 1, FEATURE_NAMES), (FEATURE_VERSION, ("length",))])
def test_features_of_another_version_do_not_count(version: int, names: tuple[str, ...]) -> None:
    features = dict.fromkeys(names, 0.5)
    kept = prompt_of(_request(1, "how are you?", features=features, decision=_decision(version)))
    assert kept == Prompt.from_text("how are you?")
    assert prompt_of(_request(1, None, features=features, decision=_decision(version))) is None


def test_sources_are_groups_of_their_own(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _request(1, source="chat"), _request(2), _outcome(1, 1), _outcome(2, 0))
    assert {group.source for group in read(path)} == {"chat", "log"}


def test_bad_lines_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _request(1))
    path.write_text(path.read_text() + '{"kind": "request", "secret": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        read(path)
    for text in ("not json", "[" * 100_000, "9" * 10_000, "\ud800"):
        path.write_text(text, errors="surrogatepass")
        with pytest.raises(DataError, match=r"line 1|decode"):
            read(path)


def test_an_error_quotes_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(_request(1, "my secret").model_dump_json().replace('"request_id":"1"', '"request_id":""') + "\n")
    with pytest.raises(DataError, match=r"line 1: request\.request_id: String should have at least 1") as caught:
        read(path)
    assert "\n" not in caught.value.message
    assert "secret" not in caught.value.message


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "b.jsonl.gz", *map(_request, range(50)))
    whole = path.read_bytes()
    for damaged in (b"not gzip", whole[:-20], whole[:40] + b"\xff" * 40 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"b\.jsonl\.gz"):
            read(path)


def test_a_folder_without_logs_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts\.parquet"):
        read(tmp_path)


def test_an_outcome_from_another_tenant_is_an_orphan(tmp_path: Path) -> None:
    def outcome(score: float, tenant: str | None) -> OutcomeRecord:
        return OutcomeRecord(request_id="1", time=score, label="feedback", score=score, tenant=tenant)

    path = _write(tmp_path / "a.jsonl", _request(1, tenant="a"), outcome(0.5, "a"), outcome(0.9, "b"))
    log = read_log(path)
    assert (log.results, log.summary.orphans) == ({"1": {"small": 0.5}}, 1)
    _write(path, _request(1, tenant="a"), outcome(0.5, "a"), outcome(0.9, None))
    assert read_log(path).results == {"1": {"small": 0.9}}


def test_half_a_line_at_the_end_of_a_file_that_is_being_written_is_not_yet_there(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.open.jsonl", _request(1))
    path.write_text(path.read_text() + '{"kind": "requ')
    assert list(read_log(tmp_path).requests) == ["1"]
    path.rename(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="line 2"):
        read_log(tmp_path)


class _ListedBefore(PosixPath):
    """A folder whose listing is a moment old."""

    def glob(self, pattern: str, **_: object) -> Iterator[Path]:  # type: ignore[override]
        yield from (self / name for name in ("a.open.jsonl", "b.jsonl") if name.endswith(pattern[1:]))


def test_files_that_were_closed_since_the_folder_was_listed_are_found(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", _request(1))
    _write(tmp_path / "b.jsonl.gz", _request(2))
    assert list(read_log(_ListedBefore(tmp_path)).requests) == ["1", "2"]


def test_ids_are_the_clients_and_come_again(tmp_path: Path) -> None:
    """The gateway writes one file after another, and the open one sorts before those that are compressed."""
    early, late = _request(1, tenant="a"), _request(1, tenant="a").model_copy(update={"time": 1e9, "max_tokens": 7})
    other = _request(1, tenant="b")

    def outcome(score: float, tenant: str | None) -> OutcomeRecord:
        return OutcomeRecord(request_id="1", time=score, label="feedback", score=score, tenant=tenant)

    path = _write(tmp_path / "a.jsonl", late, early, other, outcome(0.25, "a"), outcome(0.75, "b"), outcome(0.9, None))
    log = read_log(path)
    assert {key: record.max_tokens for key, record in log.requests.items()} == {"1 of a": 7, "1 of b": None}
    assert log.results == {"1 of a": {"small": 0.25}, "1 of b": {"small": 0.75}}
    assert (log.summary.repeated, log.summary.orphans) == (1, 1)
