"""Our rendering of llama.cpp's speculation: what it emits, what it counts, and when it stops drafting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'outrider[bench]'")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'outrider[bench]'")

from benchmarks import gguf_file, random_model
from benchmarks.llama_cpp_model import Context, Model
from benchmarks.speculation_llama_cpp import LlamaCpp, _probability
from benchmarks.workloads import Prompt

PROMPTS = [Prompt((5, 6, 7, 8, 9)), Prompt((10, 400)), Prompt(tuple(range(100, 130)))]


@pytest.fixture
def target(tmp_path: Path) -> Model:
    return Model(gguf_file.materialize(random_model.materialize("qwen3-tiny", tmp_path), tmp_path))


@pytest.fixture
def other(tmp_path: Path) -> Model:
    return Model(gguf_file.materialize(random_model.materialize("qwen3-tiny", tmp_path, seed=1), tmp_path))


class Recorder:
    """Stands in front of the target and keeps every batch it is given."""

    def __init__(self, context: Context) -> None:
        self.context, self.batches = context, list[tuple[list[int], list[int]]]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.context, name)

    def decode(self, token_ids: list[int], positions: np.ndarray, **wanted: object) -> np.ndarray:
        self.batches.append((list(token_ids), list(positions)))
        return self.context.decode(token_ids, positions, **wanted)  # type: ignore[arg-type]


def text_of(recorder: Recorder) -> dict[int, int]:
    """What stood last at each position: rejected drafts are overwritten by what the target emitted."""
    return {position: token for batch in recorder.batches for token, position in zip(*batch, strict=True)}


def test_a_draft_model_equal_to_the_target_is_always_right(target: Model) -> None:
    system = LlamaCpp(target, target, max_drafts=3)
    measured = system.run(PROMPTS, 0.0, 20)
    assert measured.num_accepted == measured.num_drafted == 3 * measured.num_steps
    assert measured.num_tokens == 4 * measured.num_steps == 3 * 20
    assert (system.name, system.drafter, system.length) == ("llama.cpp_speculative", "model", 3)


def test_greedy_output_is_that_of_plain_decoding_whatever_is_drafted(target: Model, other: Model) -> None:
    texts = []
    for draft in (None, other, target):
        system = LlamaCpp(target, draft)
        recorder = Recorder(system._target)
        system._target = recorder  # type: ignore[assignment]
        measured = system.run(PROMPTS[:1], 0.0, 24)
        assert measured.num_tokens == measured.num_steps + measured.num_accepted
        texts.append([text_of(recorder)[position] for position in range(5 + 24)])
    assert texts[0] == texts[1] == texts[2]


def test_plain_decoding_drafts_nothing(target: Model) -> None:
    system = LlamaCpp(target)
    measured = system.run(PROMPTS, 0.0, 6)
    assert (measured.num_tokens, measured.num_steps, measured.num_drafted) == (18, 18, 0)
    assert (system.name, system.drafter, system.length) == ("llama.cpp", "none", 0)


def test_an_unsure_draft_model_stops_drafting(target: Model) -> None:
    always, never = LlamaCpp(target, target, 3, 1e-6), LlamaCpp(target, target, 3, 0.999999)
    assert always.run(PROMPTS[:1], 0.0, 8).num_drafted == 3 * 2
    assert never.run(PROMPTS[:1], 0.0, 8).num_drafted == 0


def test_at_a_temperature_tokens_are_sampled_and_the_likeliest_drafts_mostly_rejected(target: Model) -> None:
    measured = LlamaCpp(target, target, max_drafts=3).run(PROMPTS, 5.0, 20)
    assert measured.num_accepted < measured.num_drafted / 4


def test_a_probability_counts_the_ten_likeliest_alone() -> None:
    logits = np.concatenate([np.zeros(10), np.full(90, -0.1)]).astype(np.float32)
    assert _probability(logits, 3) == pytest.approx(0.1)
    logits[3] = 50.0
    assert _probability(logits, 3) == pytest.approx(1.0)
