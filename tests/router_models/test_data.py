from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router_models.data import data_hash, find, prompt_digests, read_tables
from router_models.errors import DataError
from tests.router_models.tables import world, write_tables


def test_tables_are_joined_by_prompt_and_split_by_source(tmp_path: Path) -> None:
    first, second = world(40, seed=1), world(30, seed=2, source="other", models=("weak",))
    groups = read_tables(write_tables(tmp_path, first, second))
    assert [group.source for group in groups] == ["world", "other"]
    assert groups[0].models == tuple(sorted(first.models))
    assert data_hash(groups) == data_hash([second, first])
    assert groups[1].prompts[3].text == second.prompts[3].text


def test_unknown_results_stay_unknown(tmp_path: Path) -> None:
    group = world(40, seed=1)
    group.results[5, 0] = np.nan
    found = read_tables(write_tables(tmp_path, group))[0]
    assert np.isnan(found.results[5, 0])
    assert len(found.rows_with(group.models[0])) == 39
    assert 5 not in found.rows_with(*group.models)


def test_contaminated_prompts_are_left_out(tmp_path: Path) -> None:
    write_tables(tmp_path, world(10))
    table = pq.read_table(tmp_path / "prompts.parquet")
    marks = pa.array([i < 4 for i in range(10)])
    pq.write_table(table.append_column("contaminated", marks), tmp_path / "prompts.parquet")
    assert len(read_tables(tmp_path)[0]) == 6


def test_scores_a_little_out_of_range_are_clipped_and_others_refused(tmp_path: Path) -> None:
    group = world(10)
    group.results[0, 0], group.results[1, 0] = -0.03, 1.04
    assert read_tables(write_tables(tmp_path, group))[0].results[:2, 0].tolist() == [0.0, 1.0]
    group.results[0, 0] = 7
    with pytest.raises(DataError, match="between 0 and 1"):
        read_tables(write_tables(tmp_path, group))


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts\.parquet"):
        read_tables(tmp_path)
    write_tables(tmp_path, world(10))
    table = pq.read_table(tmp_path / "outcomes.parquet").drop_columns("score")
    pq.write_table(table, tmp_path / "outcomes.parquet")
    with pytest.raises(DataError, match="no column score"):
        read_tables(tmp_path)


def _with(folder: Path, file: str, **columns: pa.Array) -> Path:
    """Tables of ten prompts with some columns replaced."""
    table = pq.read_table(write_tables(folder, world(10)) / file)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, folder / file)
    return folder


@pytest.mark.parametrize(
    ("file", "column", "values", "words"),
    [
        ("prompts.parquet", "prompt", ["why?"] * 9 + [None], "row 9 has no prompt"),
        ("prompts.parquet", "prompt_id", [None] * 10, "row 0 has no prompt_id"),
        ("prompts.parquet", "prompt_id", ["a"] * 10, "prompt_id a is there twice"),
        ("outcomes.parquet", "model", [None] + ["weak"] * 39, "row 0 has no model"),
        ("outcomes.parquet", "model", ["weak"] * 40, "two scores of weak for prompt_id world-0-0"),
        ("outcomes.parquet", "score", ["right"] * 40, "right"),
        ("outcomes.parquet", "score", [[1.0]] * 40, "list"),
    ],
)
def test_what_is_no_table_of_results_is_named(
    file: str, column: str, values: list[object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        read_tables(_with(tmp_path, file, **{column: pa.array(values)}))


def test_a_score_that_is_no_number_is_unknown(tmp_path: Path) -> None:
    models = ["acme/Strong-1_5", "middle", "tiny", "weak"]
    scores = pa.array([1.0, np.nan, None, 0.0] * 10, from_pandas=False)
    folder = _with(tmp_path, "outcomes.parquet", score=scores, model=pa.array(models * 10))
    assert read_tables(folder)[0].models == ("acme/Strong-1_5", "weak")


def test_ids_and_prompts_may_be_numbers(tmp_path: Path) -> None:
    numbers = pa.array(range(10))
    _with(tmp_path, "prompts.parquet", prompt_id=numbers, prompt=numbers)
    outcomes = pa.table({"prompt_id": numbers, "model": ["weak"] * 10, "score": [True] * 10})
    pq.write_table(outcomes, tmp_path / "outcomes.parquet")
    group = read_tables(tmp_path)[0]
    assert (group.ids[3], group.prompts[3].text, group.of("weak")[3]) == ("3", "3", 1.0)


def test_the_hash_sees_every_result() -> None:
    before, group = data_hash([world(20)]), world(20)
    group.results[3, 1] = 1 - group.results[3, 1]
    assert data_hash([group]) != before


def test_sources_and_models_that_are_not_there_are_named() -> None:
    group = world(10)
    with pytest.raises(DataError, match="there are world"):
        find([group], "moon")
    with pytest.raises(DataError, match="it has acme"):
        group.of("gpt-9")
    group.results[:, 0] = np.nan
    with pytest.raises(DataError, match="no prompt"):
        group.rows_with(group.models[0])


def test_digests_know_a_prompt_again() -> None:
    prompts = world(20).prompts
    assert np.isin(prompt_digests(prompts[:5]), prompt_digests(prompts)).all()
    assert not np.isin(prompt_digests(world(20, seed=7).prompts), prompt_digests(prompts)).any()
