"""The step profile measures every stage on every load, and its stages compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.random_model import SHAPES, materialize
from benchmarks.step_profile import STAGES, Caches, Load, Stage, batch_of, measure
from engines.native.library import library
from engines.optimized.linear import PackedLinear

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
SHAPE = "qwen3-tiny"
VOCAB = SHAPES[SHAPE]["vocab_size"]
LOADS = (Load(2, 1, 40), Load(2, 3, 8), Load(1, 20, 0))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    path: Path = materialize(SHAPE, tmp_path_factory.mktemp("model"))
    return [Stage(spec, path) for spec in STAGES]


def test_every_stage_has_a_time_for_every_load(stages: list[Stage]) -> None:
    medians = measure(stages, LOADS, rounds=1, vocab=VOCAB)
    assert tuple(medians) == LOADS
    for times in medians.values():
        assert times.keys() == {spec.name for spec in STAGES}
        assert min(times.values()) > 0


@pytest.mark.parametrize(("load", "rows"), list(zip(LOADS, (2, 6, 1), strict=True)))
def test_stages_compute_the_same_logits(stages: list[Stage], load: Load, rows: int) -> None:
    caches, batch = Caches(stages[0].loaded, LOADS), batch_of(load, VOCAB)
    first, *others = (stage.step(batch, caches).float() for stage in stages)
    assert first.shape == (rows, VOCAB)
    for logits in others:
        assert (logits - first).norm() < 0.02 * first.norm()
    assert torch.isfinite(first).all()


def test_stages_are_what_their_names_say(stages: list[Stage]) -> None:
    packed = [any(isinstance(module, PackedLinear) for module in stage.loaded.model.modules()) for stage in stages]
    assert packed == [False, False, True, True, True, True, True]


def test_sequences_have_blocks_of_their_own() -> None:
    batch = batch_of(Load(3, 2, 63), VOCAB)
    assert batch.block_table.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batch.kv_lens_cpu == (65, 65, 65)
    assert batch.logit_rows.tolist() == [0, 1, 2, 3, 4, 5]
