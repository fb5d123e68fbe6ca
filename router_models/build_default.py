"""Train the artifact that is shipped, on the openly licensed part of a folder of tables.

    python -m router_models.build_default FOLDER

Equal tables give equal arrays. Takes a few minutes on one core.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from router_models import artifact
from router_models.data import data_hash, read_tables
from router_models.held_out import evaluate_held_out
from router_models.open_data import licences, openly_licensed
from router_models.report import HELD_OUT, Report, write
from router_models.train import train


def build(tables: Path, out: Path) -> artifact.Manifest:
    """Write artifact and report to `out`; raises DataError and ArtifactError as reading and saving do."""
    groups = openly_licensed(read_tables(tables))
    for licence, count in licences(groups).items():
        typer.echo(f"{count:6d} prompts under {licence}", err=True)
    trained = train(groups, progress=_tell)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = artifact.save(trained.router, artifact.Origin(now, data_hash(groups), 0), out)
    evaluations = evaluate_held_out(trained)
    write(Report(manifest.version, manifest.feature_version, manifest.data_hash, HELD_OUT, evaluations), out)
    return manifest


def _tell(stage: str, done: int, total: int) -> None:
    typer.echo(f"{stage} ({done}/{total})", err=True)


def main(
    tables: Annotated[Path, typer.Argument(help="folder with prompts.parquet and outcomes.parquet")],
    out: Annotated[Path, typer.Option(help="folder of the artifact")] = artifact.DEFAULT,
) -> None:
    """Train the artifact that is shipped."""
    typer.echo(build(tables, out).version)


if __name__ == "__main__":
    typer.run(main)
