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
