from pathlib import Path

import numpy as np
import pytest
import typer

from benchmarks.router_training import write_log
from router_models.logs import read
from tests.router_models.tables import world


def test_the_log_has_one_judged_answer_a_request(tmp_path: Path) -> None:
    group = world(40, seed=1)
    assert write_log(group, ("weak", "middle", "absent"), 70, tmp_path / "log.jsonl") == 2
    (found,) = read(tmp_path / "log.jsonl")
    assert (len(found), found.models) == (70, ("middle", "weak"))
    assert (np.isfinite(found.results).sum(axis=1) == 1).all()
    assert len({prompt.text for prompt in found.prompts}) == 70
    assert set(found.subset) == set(group.subset)


def test_more_rows_than_outcomes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="80 outcomes"):
        write_log(world(40, seed=1), ("weak", "middle"), 81, tmp_path / "log.jsonl")
