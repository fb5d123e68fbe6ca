"""Request logs as training data: requests joined with what became known about their answers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from router_models.data import Group, group_of, read_tables
from router_models.errors import DataError
from router_models.prompt import Prompt, Turn
from router_models.records import OutcomeRecord, PreferenceRecord, Record, RequestRecord

_SUFFIXES = (".jsonl", ".jsonl.gz")
# Of a file that a gateway is still writing, the last line may be there in part.
OPEN_SUFFIX = ".open.jsonl"
_adapter: TypeAdapter[Record] = TypeAdapter(Record)


@dataclass(slots=True)
class LogSummary:
    """What of a log could not be learnt from, and why."""

    requests: int = 0
    without_text: int = 0
    without_outcome: int = 0
    orphans: int = 0


@dataclass(frozen=True, slots=True)
class Log:
    """Requests by id in the order of the log, and results by request id and model."""

    requests: dict[str, RequestRecord]
    results: dict[str, dict[str, float]]
    summary: LogSummary = field(default_factory=LogSummary)


def read(path: Path) -> list[Group]:
    """Groups of a folder of tables, of one log file or of a folder of log files; raises DataError."""
    if (path / "prompts.parquet").exists():
        return read_tables(path)
    groups = as_groups(read_log(path))
    if not groups:
        raise DataError(f"{path} has no request with both its text and an outcome")
    return groups


def read_log(path: Path) -> Log:
    """All records of a file or of every log file of a folder; of two outcomes of one model the later counts.

    An outcome from another tenant than the request's is an orphan, like one of an unknown request.
    """
    files = [path] if path.is_file() else sorted(file for s in _SUFFIXES for file in path.glob(f"*{s}"))
    if not files:
        raise DataError(f"{path} has neither prompts.parquet nor files ending in {' or '.join(_SUFFIXES)}")
    requests: dict[str, RequestRecord] = {}
    later: list[OutcomeRecord | PreferenceRecord] = []
    for record in (record for file in files for record in _records(file)):
        if isinstance(record, RequestRecord):
            requests[record.request_id] = record
        else:
            later.append(record)
    return _joined(requests, sorted(later, key=lambda record: record.time))


def as_groups(log: Log) -> list[Group]:
    """Groups by source of the requests whose text was kept and whose outcome is known; the rest is counted."""
    prompts: dict[str, list[tuple[str, Prompt, str | None]]] = {}
    summary = log.summary
    for request_id, record in log.requests.items():
        summary.requests += 1
        if request_id not in log.results:
            summary.without_outcome += 1
        elif (prompt := prompt_of(record)) is None:
            summary.without_text += 1
        else:
            prompts.setdefault(record.source, []).append((request_id, prompt, record.subset))
    return [group_of(source, rows, log.results) for source, rows in prompts.items()]


def prompt_of(record: RequestRecord) -> Prompt | None:
    """The request as the router saw it; None where the log has not kept its text."""
    if record.prompt is None or not record.prompt.turns:
        return None
    turns = tuple(Turn(turn.role, turn.text) for turn in record.prompt.turns)
    return Prompt(turns, record.max_tokens, record.num_tools, record.response_format)


def _joined(requests: dict[str, RequestRecord], later: Iterable[OutcomeRecord | PreferenceRecord]) -> Log:
    log = Log(requests, {})
    for record in later:
        request = requests.get(record.request_id)
        if request is None or not _may_judge(record, request):
            log.summary.orphans += 1
            continue
        found = log.results.setdefault(record.request_id, {})
        if isinstance(record, PreferenceRecord):
            found.update(record.scores)
        elif (model := record.model or (request.use.model if request.use else None)) is not None:
            found[model] = record.score
    return Log(requests, {key: value for key, value in log.results.items() if value}, log.summary)


def _may_judge(record: OutcomeRecord | PreferenceRecord, request: RequestRecord) -> bool:
    return isinstance(record, PreferenceRecord) or record.tenant in (None, request.tenant)


def _records(path: Path) -> Iterator[Record]:
    path = _found(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (line.endswith("\n") or not path.name.endswith(OPEN_SUFFIX)):
                    yield _parse(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def _found(path: Path) -> Path:
    """Where the file is now: a gateway may have closed or compressed it since the folder was listed."""
    later = [path.with_name(path.name.split(".", 1)[0] + suffix) for suffix in _SUFFIXES]
    return next((place for place in (path, *later) if place.exists()), path)


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        return _adapter.validate_python(json.loads(line))
    except (json.JSONDecodeError, ValidationError) as error:
        raise DataError(f"{path}, line {number}: {error}") from error
