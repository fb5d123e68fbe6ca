"""Request logs as training data: requests joined with what became known about their answers."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from router_models.data import Group, group_of, read_tables
from router_models.errors import DataError
from router_models.features import FEATURE_VERSION
from router_models.prompt import Prompt, Turn
from router_models.records import OutcomeRecord, PreferenceRecord, Record, RequestRecord
from router_models.structure import FEATURE_NAMES

_SUFFIXES = (".jsonl", ".jsonl.gz")
# Of a file that a gateway is still writing, the last line may be there in part.
OPEN_SUFFIX = ".open.jsonl"
_Requests = dict[str, dict[str | None, RequestRecord]]  # by id, then by tenant
_adapter: TypeAdapter[Record] = TypeAdapter(Record)


@dataclass(slots=True)
class LogSummary:
    """What of a log could not be learnt from, and why."""

    requests: int = 0
    repeated: int = 0
    without_prompt: int = 0
    without_outcome: int = 0
    orphans: int = 0


@dataclass(frozen=True, slots=True)
class Log:
    """Requests in the order of the log, and results by model, both by what `read_log` calls a request."""

    requests: dict[str, RequestRecord]
    results: dict[str, dict[str, float]]
    summary: LogSummary = field(default_factory=LogSummary)


def read(path: Path, tell: Callable[[LogSummary], None] = lambda _: None) -> list[Group]:
    """Groups of a folder of tables, of one log file or of a folder of log files; raises DataError.

    `tell` hears what of a log could not be learnt from.
    """
    if (path / "prompts.parquet").exists():
        return read_tables(path)
    log = read_log(path)
    groups = as_groups(log)
    tell(log.summary)
    if not groups:
        found = log.summary
        raise DataError(
            f"{path} has nothing to learn from: of {found.requests} requests {found.without_outcome} are without an "
            f"outcome and {found.without_prompt} without text or features of version {FEATURE_VERSION}"
        )
    return groups


def read_log(path: Path) -> Log:
    """All records of a file or of every log file of a folder; of two outcomes of one model the later counts.

    An outcome from another tenant than the request's is an orphan, like one of an unknown request. Request ids are the
    clients' and may come again: of one tenant's requests with one id the latest counts, those of two tenants are two.
    """
    files = [path] if path.is_file() else sorted(file for s in _SUFFIXES for file in path.glob(f"*{s}"))
    if not files:
        raise DataError(f"{path} has neither prompts.parquet nor files ending in {' or '.join(_SUFFIXES)}")
    requests: _Requests = {}
    later: list[OutcomeRecord | PreferenceRecord] = []
    summary = LogSummary()
    for record in (record for file in files for record in _records(file)):
        if isinstance(record, RequestRecord):
            known = requests.setdefault(record.request_id, {})
            earlier = known.get(record.tenant)
            summary.repeated += earlier is not None
            if earlier is None or earlier.time <= record.time:
                known[record.tenant] = record
        else:
            later.append(record)
    return _joined(requests, sorted(later, key=lambda record: record.time), summary)


def as_groups(log: Log) -> list[Group]:
    """Groups by source of the requests whose outcome and whose text or features are known; the rest is counted."""
    prompts: dict[str, list[tuple[str, Prompt, str | None]]] = {}
    summary = log.summary
    for request_id, record in log.requests.items():
        summary.requests += 1
        if request_id not in log.results:
            summary.without_outcome += 1
        elif (prompt := prompt_of(record)) is None:
            summary.without_prompt += 1
        else:
            prompts.setdefault(record.source, []).append((request_id, prompt, record.subset))
    return [group_of(source, rows, log.results) for source, rows in prompts.items()]


def prompt_of(record: RequestRecord) -> Prompt | None:
    """The request as the router saw it; None where the log has kept neither its text nor features of this version."""
    logged = () if record.prompt is None else record.prompt.turns
    structure = _structure(record)
    if not logged and structure is None:
        return None
    turns = tuple(Turn(turn.role, turn.text) for turn in logged)
    return Prompt(turns, record.max_tokens, structure=structure)


def _structure(record: RequestRecord) -> tuple[float, ...] | None:
    """The logged features in the order of FEATURE_NAMES, if they are those that this version computes."""
    version = None if record.decision is None else record.decision.feature_version
    if record.features is None or (version, tuple(record.features)) != (FEATURE_VERSION, FEATURE_NAMES):
        return None
    return tuple(record.features.values())


def _joined(
    requests: _Requests,
    later: Iterable[OutcomeRecord | PreferenceRecord],
    summary: LogSummary,
) -> Log:
    log = Log({_key(record, known): record for known in requests.values() for record in known.values()}, {}, summary)
    for record in later:
        known = requests.get(record.request_id, {})
        request = _judged(record, known)
        if request is None:
            summary.orphans += 1
            continue
        found = log.results.setdefault(_key(request, known), {})
        if isinstance(record, PreferenceRecord):
            found.update(record.scores)
        elif (model := record.model or (request.use.model if request.use else None)) is not None:
            found[model] = record.score
    return Log(log.requests, {key: value for key, value in log.results.items() if value}, summary)


def _key(record: RequestRecord, known: Mapping[str | None, RequestRecord]) -> str:
    """The id, with the tenant where several have sent it."""
    return record.request_id if len(known) == 1 else f"{record.request_id} of {record.tenant}"


def _judged(
    record: OutcomeRecord | PreferenceRecord, known: Mapping[str | None, RequestRecord]
) -> RequestRecord | None:
    """The request that is meant: its own tenant's; where none is named, the only one with that id."""
    tenant = record.tenant if isinstance(record, OutcomeRecord) else None
    if tenant is not None:
        return known.get(tenant)
    return next(iter(known.values())) if len(known) == 1 else None


def _records(path: Path) -> Iterator[Record]:
    path = _found(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (line.endswith("\n") or not path.name.endswith(OPEN_SUFFIX)):
                    yield _parse(path, number, line)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def _found(path: Path) -> Path:
    """Where the file is now: a gateway may have closed or compressed it since the folder was listed."""
    later = [path.with_name(path.name.split(".", 1)[0] + suffix) for suffix in _SUFFIXES]
    return next((place for place in (path, *later) if place.exists()), path)


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        return _adapter.validate_python(json.loads(line))
    except ValidationError as error:
        # Without the values: they may be prompts.
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "the whole line"
        raise DataError(f"{path}, line {number}: {place}: {detail['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON: {error}") from error
