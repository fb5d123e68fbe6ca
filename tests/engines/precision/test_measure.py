from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.config import LocalEngineConfig
from engines.errors import EvaluationError, ModelLoadError
from engines.local import LoadedEngine
from engines.precision import measure as module
from engines.precision.candidates import Candidate, candidates
from engines.precision.data import Row, read_rows
from engines.precision.measure import Measurement, measure
from engines.tokenizer import Tokenizer
from tests.engines.precision.tiny import save_model, words, write_rows

Stages = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("precision") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    texts = [{"text": words(20, seed)} for seed in range(3)]
    prompts = [{"prompt": words(3, seed), "reference": words(2, seed + 50)} for seed in range(3)]
    chats = [{"messages": [{"role": "user", "content": words(3, seed)}]} for seed in range(2)]
    return read_rows(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [*texts, *prompts, *chats]))


def candidate(model: Path, precision: str, kv: str = "auto") -> Candidate:
    (made,) = candidates(str(model), [precision], [kv], device="cpu")
    return made


def measured(model: Path, rows: list[Row], precision: str, kv: str = "auto", max_new_tokens: int = 4) -> Measurement:
    return measure(candidate(model, precision, kv), rows, max_new_tokens, lambda stage, done, total: None)


def test_loss_and_answers_are_the_models_own(model: Path, rows: list[Row]) -> None:
    found = measured(model, rows, "fp32")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    nats = 0.0
    for example, answer in zip(found.examples, found.answers, strict=True):
        ids = torch.tensor([example.token_ids])
        with torch.inference_mode():
            logits = reference(ids).logits[0, example.first_scored - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, example.first_scored :], reduction="sum").item()
        if example.prompt is not None:
            assert answer is not None
            greedy = reference.generate(
                torch.tensor([example.prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=True
            )[0, len(example.prompt) :].tolist()
            assert list(answer.token_ids) == greedy[: len(answer.token_ids)]
            assert answer.text == Tokenizer.load(str(model)).decode(greedy)
    assert found.nats == pytest.approx(nats, rel=1e-4)
    assert found.loss == pytest.approx(nats / sum(example.num_scored for example in found.examples), rel=1e-4)


def test_rows_without_a_prompt_are_not_answered(model: Path, rows: list[Row]) -> None:
    found = measured(model, rows, "bf16")
    assert [answer is None for answer in found.answers] == [row.text is not None for row in rows]
    assert all(answer is None for answer in measured(model, rows, "bf16", max_new_tokens=0).answers)


def test_bytes_are_those_of_weights_and_cache(model: Path, rows: list[Row]) -> None:
    fp32, bf16 = measured(model, rows, "fp32"), measured(model, rows, "bf16")
    assert fp32.weight_bytes / bf16.weight_bytes == pytest.approx(2, rel=0.01)
    assert (fp32.kv_bytes_per_token, bf16.kv_bytes_per_token) == (2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * 16 * 2)
    assert fp32.max_model_len == 512


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_are_smaller_and_say_nearly_the_same(model: Path, rows: list[Row], precision: str) -> None:
    bf16, found = measured(model, rows, "bf16"), measured(model, rows, precision)
    assert found.weight_bytes < 0.8 * bf16.weight_bytes
    assert found.nats != bf16.nats
    assert found.nats == pytest.approx(bf16.nats, rel=0.05)


def test_a_quantized_cache_is_smaller_and_its_loss_shows(model: Path, rows: list[Row]) -> None:
    bf16, found = measured(model, rows, "bf16"), measured(model, rows, "bf16", "int8")
    assert found.weight_bytes == bf16.weight_bytes
    assert found.kv_bytes_per_token < 0.7 * bf16.kv_bytes_per_token
    assert found.nats != bf16.nats, "what was cached was read back"
    assert found.nats == pytest.approx(bf16.nats, rel=0.02)


def test_the_engine_is_let_go_of(model: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[object]] = []
    load = module.load_engine

    def watched(config: LocalEngineConfig) -> LoadedEngine:
        engine = load(config)
        loaded.append(weakref.ref(engine.core.runner))
        return engine

    monkeypatch.setattr(module, "load_engine", watched)
    measured(model, rows, "bf16")
    assert [reference() for reference in loaded] == [None]


def test_progress_tells_the_stages(model: Path, rows: list[Row]) -> None:
    stages: Stages = []
    measure(candidate(model, "bf16"), rows, 2, lambda *stage: stages.append(stage))
    assert stages[0] == ("bf16: loading", 0, 0)
    assert ("bf16: reading", 8, 8) in stages
    assert stages[-1] == ("bf16: answering", 5, 5)


def test_failures_pass_through(model: Path, rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        measured(tmp_path / "absent", rows, "bf16")
    long = read_rows(write_rows(tmp_path / "long.jsonl", [{"text": words(300, 0)}]))
    with pytest.raises(EvaluationError, match="Line 1 has"):
        measured(model, long, "bf16")
