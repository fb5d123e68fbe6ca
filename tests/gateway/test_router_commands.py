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
        (["evaluate", "ROUTER", "DATA", "--source", "world", "--report", "FILE"], "File exists"),
        (["evaluate", "ROUTER", "DATA", "--source", "world", "--expert", "moon"], "no expert of 'moon'; it has world"),
        (["train", "DATA", "--out", "FILE"], "Not a directory"),
        (["train", "DATA", "--out", "FILE/new"], "File exists"),
        (["train", "DATA", "--out", "DATA"], "is not an artifact"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_1(
    arguments: list[str], words: str, router: Path, tables: Path, tmp_path: Path
) -> None:
    places = {"DATA": tables, "ROUTER": router, "EMPTY": tmp_path, "FILE": tables / "prompts.parquet"}
    for name, place in places.items():
        arguments = [part.replace(name, str(place)) for part in arguments]
    result = CliRunner().invoke(app, [*arguments, *_MODELS])
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_report_on_models_that_the_data_does_not_have_is_refused_before_training(
    tables: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["train", str(tables), "--out", str(tmp_path / "new"), "--strong", "gpt-9"])
    assert result.exit_code == 1
    assert "no model 'gpt-9'; it has acme/Strong-1_5, middle" in result.stderr
    assert "expert" not in result.stderr


def test_a_router_that_was_not_compared_is_not_recommended(tmp_path: Path) -> None:
    data = write_tables(tmp_path / "data", world(60, seed=1, models=("weak",)))
    result = CliRunner().invoke(app, ["train", str(data), "--out", str(tmp_path / "new"), "--base", "none"])
    assert result.exit_code == 0, result.output
    assert "no two models answered" in result.stdout
    assert "no two models answered" in (tmp_path / "new" / "report.html").read_text()
    assert not json.loads((tmp_path / "new" / "report.json").read_text())["is_recommended"]


def test_a_source_with_hardly_any_labels_is_left_out(tmp_path: Path) -> None:
    data = write_tables(tmp_path / "data", world(60, seed=1), world(5, seed=2, source="small"))
    result = CliRunner().invoke(app, ["train", str(data), "--out", str(tmp_path / "new"), "--base", "none", "--json"])
    assert result.exit_code == 0, result.output
    assert "small is left out: 5 labelled prompts" in result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert [evaluation["source"] for evaluation in document["evaluations"]] == ["world"]
