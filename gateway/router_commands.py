"""`outrider train`, `outrider evaluate` and the offline part of `outrider replay`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from router_models.data import Group
    from router_models.evaluate import Evaluation
    from router_models.fit import Progress
    from router_models.logs import LogSummary

_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]
DataPath = Annotated[
    Path, typer.Argument(help="a folder with prompts.parquet and outcomes.parquet, or request logs in JSON lines")
]


def train(
    logs: DataPath,
    out: Annotated[Path, typer.Option(help="folder of the new artifact; one that is there is replaced whole")],
    base: Annotated[str, typer.Option(help="artifact to learn on top of: default, a folder, or none")] = "default",
    seed: Annotated[int, typer.Option(help="equal data and seed give an equal router")] = 0,
    embedding: Annotated[
        bool, typer.Option("--embedding", help="read a sentence embedding too: needs the extra of that name")
    ] = False,
    strong: Annotated[
        str | None, typer.Option(help="strong model of the report; the best of each source if not given")
    ] = None,
    weak: Annotated[str | None, typer.Option(help="weak model of the report; the median one if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a router on tables or request logs, and report how it compares with its baselines on held-out prompts.

    Exit status 0 even where the report does not recommend the artifact; read the report before promoting it.
    """
    with _reported():
        # scikit-learn takes a second to import.
        from router_models import artifact, data, report
        from router_models import logs as log_files
        from router_models.embedding import SentenceEmbedding
        from router_models.held_out import evaluate_held_out
        from router_models.train import train as fit

        artifact.check_place(out)
        groups = log_files.read(logs, _tell)
        _check_models(groups, strong, weak)
        groups = _large_enough(groups)
        under = None if base == "none" else artifact.load(artifact.resolve(base))
        reader = SentenceEmbedding.load() if embedding else None
        with _progress() as progress:
            trained = fit(groups, under.router if under else None, seed, progress, embedding=reader)
        used = under.manifest.version if under and trained.used_base else None
        if under and not trained.used_base:
            _errors.print(
                f"not on top of {base}: it was trained on some of these prompts", style="yellow", markup=False
            )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest = artifact.save(trained.router, artifact.Origin(now, data.data_hash(groups), seed, used), out)
        found = report.Report(
            artifact=manifest.version,
            feature_version=manifest.feature_version,
            data_hash=manifest.data_hash,
            how=report.HELD_OUT,
            evaluations=evaluate_held_out(trained, strong, weak),
        )
        report.write(found, out)
    _show(found.evaluations, out / "report.html")
    if as_json:
        typer.echo(json.dumps(found.document() | {"out": str(out), "base": used}))


def evaluate(
    artifact: Annotated[str, typer.Argument(help="an artifact's folder, or default")],
    data: DataPath,
    source: Annotated[str, typer.Option(help="source of the prompts, as the data names it")],
    strong: Annotated[str, typer.Option(help="the strong model, as the data names it")],
    weak: Annotated[str, typer.Option(help="the weak model, as the data names it")],
    expert: Annotated[
        str | None, typer.Option(help="source whose expert is asked, where it is not the data's own")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="folder for report.json and report.html")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a router and its baselines on prompts whose outcomes are known."""
    with _reported():
        from router_models import artifact as artifacts
        from router_models import logs
        from router_models import report as reports
        from router_models.data import data_hash, find
        from router_models.evaluate import evaluate as measure

        loaded = artifacts.load(artifacts.resolve(artifact))
        group = find(logs.read(data), source)
        found = measure(loaded.router, group, strong, weak, source=expert)
        if report is not None:
            how = f"Measured on {data}, source {source}."
            version = loaded.manifest.version, loaded.manifest.feature_version
            reports.write(reports.Report(*version, data_hash([group]), how, [found]), report)
    if as_json:
        about = {"artifact": loaded.manifest.version, "data": str(data)}
        names = {"strong_model": strong, "weak_model": weak}
        typer.echo(json.dumps(found.document() | about | names))
    else:
        _show([found], report / "report.html" if report else None)


@contextmanager
def _reported() -> Iterator[None]:
    """Tell a routing error in one line, with exit status 1."""
    from router_models.errors import RouterError

    try:
        yield
    except RouterError as error:
        message = error.message
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    else:
        return
    _errors.print(message, style="red", markup=False)
    raise typer.Exit(1)


def _check_models(groups: Sequence[Group], *named: str | None) -> None:
    from router_models.errors import DataError

    known = sorted({model for group in groups for model in group.models})
    for name in named:
        if name is not None and name not in known:
            raise DataError(f"the data has no model {name!r}; it has {', '.join(known)}")


def _large_enough(groups: list[Group]) -> list[Group]:
    """Without those that have too few labels to learn from, if any other is left."""
    from router_models.data import MIN_LABELS

    large = [group for group in groups if len(group) >= MIN_LABELS]
    for group in groups if large else ():
        if len(group) < MIN_LABELS:
            told = f"{group.source} is left out: {len(group)} labelled prompts, {MIN_LABELS} are needed"
            _errors.print(told, style="yellow", markup=False)
    return large or groups


@contextmanager
def _progress() -> Iterator[Progress]:
    """On a terminal one line that moves, elsewhere a line for each stage; on stderr."""
    with _errors.status("") as status:

        def show(stage: str, done: int, total: int) -> None:
            if _errors.is_terminal:
                status.update(f"{stage} ({done}/{total})")
            else:
                _errors.print(f"{stage} ({done}/{total})", markup=False)

        yield show


def _tell(log: LogSummary) -> None:
    """What of a log could not be learnt from."""
    reasons = {
        "without an outcome": log.without_outcome,
        "without text or features of this version": log.without_prompt,
        "outcomes of no request": log.orphans,
        "ids sent again": log.repeated,
    }
    told = "; ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    _errors.print(f"{log.requests} requests" + (f"; not used: {told}" if told else ""), markup=False)


def _show(evaluations: Sequence[Evaluation], page: Path | None) -> None:
    for found in evaluations:
        table = Table(title=f"{found.source}: {found.strong_model} or {found.weak_model}, {found.n} prompts")
        table.add_column("score")
        for name in ("APGR", "exact", "error", "within", "CPT50", "CPT80"):
            table.add_column(name, justify="right")
        rows: dict[str, Any] = {"router": found.router} | found.baselines
        for name, ranking in rows.items():
            if ranking is not None:
                fields = ("apgr", "apgr_exact", "apgr_stderr", "apgr_within", "cpt50", "cpt80")
                table.add_row(name, *(_number(getattr(ranking, field)) for field in fields))
        _console.print(table)
        _console.print(f"Calibration error {found.calibration.ece:.3f}; abstains on {found.abstention_rate:.1%}.")
        _console.print(
            "Recommended." if found.is_recommended else f"Not recommended: {'; '.join(found.refusals)}.", markup=False
        )
    if not evaluations:
        from router_models.report import NOT_COMPARED

        _console.print(NOT_COMPARED)
    if page is not None:
        _console.print(f"Report: {page}", markup=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
