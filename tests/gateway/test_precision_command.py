"""`outrider precision` from the command line to the last line of JSON, over a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gateway.cli import app
from tests.engines.precision.tiny import save_model, words, write_rows

FEW = [{"prompt": words(2, seed), "reference": words(3, seed + 100)} for seed in range(4)]
ENOUGH = [{"text": words(6, seed)} for seed in range(32)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("precision") / "model"))


def run(model: str, rows: list[Mapping[str, Any]], folder: Path, *options: str) -> Result:
    data = write_rows(folder / "rows.jsonl", rows)
    return CliRunner().invoke(app, ["precision", model, "--data", str(data), "--device", "cpu", *options])


def document(result: Result) -> dict[str, Any]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_names_what_is_lower_and_good_enough(model: str, tmp_path: Path) -> None:
    result = run(model, ENOUGH, tmp_path, "--precisions", "fp32,bf16", "--kv", "auto", "--json")
    found = document(result)
    assert result.exit_code == 0, result.output
    assert (found["recommended"], found["is_lower"]) == ("bf16", True)
    assert (found["model"], found["bound"], found["confidence"]) == (model, 0.01, 0.95)
    assert (found["num_rows"], found["num_scored_rows"]) == (32, 32)
    baseline, bf16 = found["findings"]
    assert (baseline["name"], baseline["increase"]) == ("fp32", None)
    assert bf16["increase"]["low"] <= bf16["increase"]["estimate"] <= bf16["increase"]["high"] < 0.01
    assert bf16["loss"] == pytest.approx(baseline["loss"] * (1 + bf16["increase"]["estimate"]))
    assert bf16["weight_bytes"] < 0.6 * baseline["weight_bytes"]


def test_quantized_weights_can_be_asked_for(model: str, tmp_path: Path) -> None:
    result = run(model, ENOUGH, tmp_path, "--precisions", "bf16,int8", "--kv", "auto", "--bound", "0.5", "--json")
    assert document(result)["recommended"] == "int8"
    assert result.exit_code == 0


def test_too_few_rows_keep_the_first_precision(model: str, tmp_path: Path) -> None:
    result = run(model, FEW, tmp_path, "--precisions", "fp32,bf16", "--kv", "auto", "--max-new-tokens", "3")
    assert result.exit_code == 1
    assert "Recommended: fp32. 4 rows with something to score are too few" in result.stdout
    assert "bf16" in result.stdout


def test_a_bound_that_nothing_keeps(model: str, tmp_path: Path) -> None:
    result = run(model, ENOUGH, tmp_path, "--precisions", "fp32,bf16", "--kv", "auto", "--bound", "0", "--json")
    found = document(result)
    if found["findings"][1]["increase"]["high"] >= 0:  # of random weights, bf16 may be the better ones
        assert (found["recommended"], result.exit_code) == ("fp32", 1)


def test_limit_and_a_scorer_of_ones_own(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer.py").write_text("def points(row, answer):\n    return len(row['prompt'])\n")
    monkeypatch.chdir(tmp_path)
    options = ("--precisions", "bf16", "--kv", "auto", "--scorer", "my_scorer:points", "--limit", "2", "--json")
    found = document(run(model, FEW, tmp_path, *options, "--max-new-tokens", "2"))
    assert found["num_rows"] == 2
    expected = sum(len(row["prompt"]) for row in FEW[:2]) / 2
    assert found["findings"][0]["score"] == pytest.approx(expected)


def test_progress_goes_to_stderr(model: str, tmp_path: Path) -> None:
    result = run(model, FEW, tmp_path, "--precisions", "bf16", "--kv", "auto", "--max-new-tokens", "2", "--json")
    stages = [line for line in result.stderr.splitlines() if line.startswith("bf16: ")]
    assert stages == ["bf16: loading", "bf16: reading", "bf16: answering"]
    assert "loading" not in result.stdout


def test_a_malformed_row_is_a_line(model: str, tmp_path: Path) -> None:
    result = run(model, [*FEW, {"prompt": 3}], tmp_path)
    assert result.exit_code == 1
    assert "line 5: prompt is to be a string" in result.stderr


def test_a_model_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    result = run(str(tmp_path / "absent"), FEW, tmp_path)
    assert result.exit_code == 1
    assert "There is no folder" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precisions", "bf16,int3"), "'int3' is not one of fp32, fp16, bf16, int8, int4"),
        (("--precisions", "bf16,bf16"), "twice"),
        (("--kv", "fp8"), "'fp8' is not one of auto, int8"),
        (("--confidence", "1"), "between 0 and 1"),
        (("--bound", "-1"), "--bound"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    result = run("m", FEW, tmp_path, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
