import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import router
from benchmarks.router_acceptance import _NEXT_TOKENS, _PROMPT_TOKENS, _windows
from benchmarks.router_domains import Domain
from benchmarks.router_world import World, ece_floor, subset_folds, without_twins
from router_models.data import Group
from router_models.embedding import SentenceEmbedding
from router_models.features import extract
from router_models.prompt import Prompt
from router_models.router import Predictions
from tests.router_models.tables import Topics, world, write_tables


def _group(source: str, *texts: str) -> Group:
    prompts = tuple(Prompt.from_text(text) for text in texts)
    results = np.column_stack([np.ones(len(texts)), np.arange(len(texts)) % 2]).astype(float)
    ids = tuple(map(str, range(len(texts))))
    return Group(source, ids, prompts, np.array([""] * len(texts)), ("strong", "weak"), results)


def test_a_question_with_other_options_is_a_twin() -> None:
    first = _group("a", "Why is it?\nA. yes\nB. no", "Question: Who?\nA. he", "Alone\nA. x")
    second = _group("b", "Why is it\nA. perhaps\nB. yes\nC. no", "Where?\nA. here")
    everything = World((first, second), tuple(extract(group.prompts) for group in (first, second)))
    found = Predictions(np.full((3, 2), 0.5), np.zeros(3), np.array([0.1, 0.2, 0.3]))
    assert without_twins(everything, ("a", "strong", "weak"), found)["n"] == 2


def test_subsets_are_held_out_whole_where_there_are_enough() -> None:
    group = _group("a", *map(str, range(40)))
    named = Group(
        "a", group.ids, group.prompts, np.array([f"s{i % 8}" for i in range(40)]), group.models, group.results
    )
    fold = subset_folds(named, seed=0)
    assert all(len(set(fold[named.subset == name])) == 1 for name in np.unique(named.subset))
    assert set(fold) == set(range(5))
    assert np.bincount(subset_folds(group, seed=0)).tolist() == [8] * 5


def test_a_domain_is_of_its_own_source_only() -> None:
    group = world(50, seed=1)
    some = Domain("world", ("algebra", "topology"), ("world", "acme/Strong-1_5", "weak"))
    assert set(group.subset[some.rows(group)]) == {"algebra", "topology"}
    assert len(Domain("world", (), some.pair).rows(group)) == 50
    assert len(Domain("elsewhere", (), some.pair).rows(group)) == 0


def test_the_floor_of_the_calibration_error_falls_with_the_number_of_prompts() -> None:
    rng = np.random.default_rng(0)
    few, many = (ece_floor(rng.random((size, 2))) for size in (200, 20_000))
    assert max(many) < 0.02 < min(few)


def test_windows_for_testing_share_no_token_with_those_for_training() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "demo" / "models" / "target")
    found = _windows(tokenizer, 50)
    assert found.token_ids.shape == (50, _PROMPT_TOKENS + _NEXT_TOKENS)
    assert 5 < found.is_test.sum() < 45


def test_parts_are_kept_as_long_as_the_data_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(router.main)
    monkeypatch.setattr(router, "STEPS", {"one": lambda _: 1, "two": lambda w: len(w.groups)})
    out = tmp_path / "found.json"
    data = write_tables(tmp_path / "data", world(20, seed=1))
    for part in ("one", "two"):
        result = CliRunner().invoke(app, ["--data", str(data), "--parts", part, "--out", str(out)])
        assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [document[part]["figures"] for part in ("one", "two")] == [1, 1]
    other = write_tables(tmp_path / "other", world(20, seed=2))
    CliRunner().invoke(app, ["--data", str(other), "--parts", "two", "--out", str(out)])
    assert "one" not in json.loads(out.read_text())


def test_with_an_embedding_everything_is_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(router.main)
    monkeypatch.setattr(router, "STEPS", {"one": lambda w: w.features[0].embedding is not None})
    monkeypatch.setattr(SentenceEmbedding, "load", Topics)
    out, data = tmp_path / "found.json", write_tables(tmp_path / "data", world(20, seed=1))
    for arguments in ([], ["--embedding"]):
        result = CliRunner().invoke(app, ["--data", str(data), "--out", str(out), *arguments])
        assert result.exit_code == 0, result.output
        document = json.loads(out.read_text())
        assert document["one"]["figures"] == ("embedding" in document) == bool(arguments)
    monkeypatch.setattr(router, "STEPS", {"one": lambda _: 0, "two": lambda _: 2})
    CliRunner().invoke(app, ["--data", str(data), "--parts", "two", "--out", str(out)])
    assert "one" not in json.loads(out.read_text())
