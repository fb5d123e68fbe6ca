import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from tests.router_models.tables import world, write_tables

_MODELS = ["--strong", "acme/Strong-1_5", "--weak", "weak"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("data"), world(300, seed=1))


@pytest.fixture(scope="module")
def router(tables: Path) -> Path:
    out = tables / "router"
    result = CliRunner().invoke(app, ["train", str(tables), "--out", str(out), "--base", "none", "--json", *_MODELS])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["evaluations"][0]["router"]["apgr_exact"] > 0.6
    assert (out / "report.html").exists()
    return out


def test_evaluate_prints_one_document(router: Path, tmp_path: Path) -> None:
    data = write_tables(tmp_path, world(400, seed=9))
    arguments = ["evaluate", str(router), str(data), "--source", "world", *_MODELS, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["n"] == 400
    assert document["router"]["apgr_exact"] > document["baselines"]["length"]["apgr_exact"]


def test_evaluate_writes_a_report_and_tells_the_figures(router: Path, tmp_path: Path) -> None:
    data = write_tables(tmp_path, world(200, seed=9))
    arguments = ["evaluate", str(router), str(data), "--source", "world", *_MODELS, "--report", str(tmp_path / "r")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "shuffled_labels" in result.stdout
    assert (tmp_path / "r" / "report.json").exists()


def test_the_shipped_artifact_serves(tmp_path: Path) -> None:
    data = write_tables(tmp_path, world(60, seed=9))
    arguments = ["evaluate", "default", str(data), "--source", "world", *_MODELS, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ability"] == "typical"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere", "DATA", "--source", "world"], "artifact.json"),
        (["evaluate", "ROUTER", "DATA", "--source", "moon"], "no source"),
        (["evaluate", "ROUTER", "EMPTY", "--source", "world"], "prompts.parquet"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_1(
    arguments: list[str], words: str, router: Path, tables: Path, tmp_path: Path
) -> None:
    places = {"DATA": str(tables), "ROUTER": str(router), "EMPTY": str(tmp_path)}
    result = CliRunner().invoke(app, [*(places.get(part, part) for part in arguments), *_MODELS])
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output
