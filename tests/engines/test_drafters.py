"""From configuration to drafters, and which draft models are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from drafting.draft_length import AdaptiveLength, FixedLength
from engines.build import load_engine
from engines.config import DrafterConfig, LocalEngineConfig
from engines.core import EngineCore
from engines.drafters import check_vocabulary, make_lookups, make_policy, make_speculation
from engines.errors import VocabularyMismatchError
from engines.local import LoadedEngine
from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from tests.engines import tiny_models
from tests.engines.tokenizers import character_tokenizer, word_tokenizer

CPU = torch.device("cpu")


def parse(**fields: Any) -> DrafterConfig:
    adapter: TypeAdapter[DrafterConfig] = TypeAdapter(DrafterConfig)
    return adapter.validate_python(fields)


class TestVocabulary:
    def test_the_same_words_at_the_same_ids_are_fine(self) -> None:
        check_vocabulary(word_tokenizer(10), word_tokenizer(10), "draft")

    @pytest.mark.parametrize(("ours", "theirs"), [(10, 12), (12, 10)])
    def test_another_size_is_refused_with_both_sizes_and_the_first_difference(self, ours: int, theirs: int) -> None:
        meant = ("no token to the target and 'w10' to the draft", "'w10' to the target and no token to the draft")
        words = f"'tiny'.*target has {ours} tokens.*draft {theirs}.*differ at id 10, which is {meant[ours > theirs]}"
        with pytest.raises(VocabularyMismatchError, match=words):
            check_vocabulary(word_tokenizer(ours), word_tokenizer(theirs), "tiny")

    def test_an_equal_size_is_not_enough(self) -> None:
        target, draft = word_tokenizer(10), word_tokenizer(10)
        swapped = draft.vocabulary() | {4: "w7", 7: "w4"}
        draft.vocabulary = lambda: swapped  # type: ignore[method-assign]
        with pytest.raises(VocabularyMismatchError, match=r"10 tokens.*draft 10.*differ at id 4, which is 'w4'.*'w7'"):
            check_vocabulary(target, draft, "tiny")


class TestConfiguration:
    @pytest.mark.parametrize(
        ("kind", "sources"),
        [
            ("ngram", ["ngram"]),
            ("suffix", ["suffix"]),
            ("prediction", ["prediction"]),
            ("auto", ["prediction", "ngram", "suffix"]),
        ],
    )
    def test_kinds(self, kind: str, sources: list[str]) -> None:
        config = parse(kind=kind)
        assert list(make_lookups(config)) == sources
        assert make_speculation(config, None, None, 100, CPU).speculator.sources == set(sources)

    def test_none_is_plain_decoding(self) -> None:
        speculation = make_speculation(parse(kind="none"), None, None, 100, CPU)
        assert speculation.speculator.sources == set()
        assert (speculation.reader, speculation.max_draft_tokens) == (None, 0)

    def test_bounds_and_lengths_are_passed_on(self) -> None:
        speculation = make_speculation(parse(kind="ngram", max_draft_tokens=7, draft_length=3), None, None, 100, CPU)
        assert speculation.max_draft_tokens == 7
        assert isinstance(speculation.speculator.policy, FixedLength)
        assert isinstance(make_policy("adaptive"), AdaptiveLength)
        with pytest.raises(ValidationError):
            parse(kind="ngram", max_draft_tokens=65)

    @pytest.mark.parametrize("size", [2, 500, 1023, 1024, 2**24, 2**24 + 1])
    @pytest.mark.parametrize("kind", ["suffix", "auto"])
    def test_every_history_that_the_configuration_accepts_can_be_built(self, kind: str, size: int) -> None:
        try:
            config = parse(kind=kind, max_history_tokens=size)
        except ValidationError:
            assert not 1024 <= size <= 2**24
            return
        assert "suffix" in make_lookups(config)

    def test_what_was_learnt_is_taken_up(self) -> None:
        config = parse(kind="auto")
        first = make_speculation(config, None, None, 100, CPU).speculator
        first._prices.verify.observe(4, 1, 100, 0.01)
        for _ in range(9):
            first._acceptance["ngram"].observe(0, [0.5], 1, 1)
        kept = json.loads(json.dumps(first.state()))
        second = make_speculation(config, None, None, 100, CPU, kept).speculator
        assert second._prices.verify.is_known
        rates = [one._acceptance["ngram"].rates(1, [0.5])[0] for one in (first, second)]
        assert rates[0] == pytest.approx(rates[1])
        assert rates[0] > 0.7

    @pytest.mark.parametrize("kept", [{}, {"prices": 3}, {"prices": {"verify": None, "draft": None}}])
    def test_what_was_not_kept_is_learnt_anew(self, kept: Any) -> None:
        speculator = make_speculation(parse(kind="ngram"), None, None, 100, CPU, kept).speculator
        assert not speculator._prices.verify.is_known

    @pytest.mark.parametrize(
        "kept",
        [
            {"prices": {"verify": {"base_s": 10**400}}},
            {"prices": {"verify": [1]}},
            {"acceptance": {"ngram": []}},
            {"acceptance": {"ngram": {"first": 3}}},
        ],
    )
    def test_what_is_damaged_is_learnt_anew_and_said(self, kept: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            speculator = make_speculation(parse(kind="ngram"), None, None, 100, CPU, kept).speculator
        assert not speculator._prices.verify.is_known
        assert "learnt anew" in caplog.text

    def test_prices_are_kept_where_drafters_change(self) -> None:
        first = make_speculation(parse(kind="ngram"), None, None, 100, CPU).speculator
        first._prices.verify.observe(4, 1, 100, 0.01)
        second = make_speculation(parse(kind="suffix"), None, None, 100, CPU, first.state()).speculator
        assert second._prices.verify.is_known

    @pytest.mark.parametrize(
        "fields",
        [
            {"kind": "ngram", "draft_length": 20},
            {"kind": "ngram", "draft_length": True},
            {"kind": "auto", "revision": "main"},
            {"kind": "suffix", "max_history_tokens": 10},
        ],
    )
    def test_settings_without_an_effect_are_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            parse(**fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with one tokenizer of 96 tokens."""
    shapes: dict[str, dict[str, int]] = {
        "target": {},
        "draft": {"num_hidden_layers": 1},
        "padded": {"num_hidden_layers": 1, "vocab_size": 128},
        "cut": {"num_hidden_layers": 1, "vocab_size": 64},
        "short": {"num_hidden_layers": 1, "max_position_embeddings": 24},
    }
    found = {}
    for name, shape in shapes.items():
        config = tiny_models.SUPPORTED["llama"]()
        config.update(shape)
        found[name] = tiny_models.save(config, tmp_path_factory.mktemp(name))
        character_tokenizer().save_pretrained(found[name])
    return found


def load(folders: dict[str, Path], drafter: dict[str, Any], **more: object) -> LoadedEngine:
    small = {"kv_cache_bytes": 1 << 20, "num_threads": 1, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    fields = {"model": str(folders["target"]), "device": "cpu", "drafter": drafter, "costs_file": ""} | small
    return load_engine(LocalEngineConfig.model_validate(fields | more))


def generate(core: EngineCore) -> list[int]:
    output: list[int] = []
    core.add(
        0, GenerateRequest("r", TokenPrompt((5, 6, 7)), SamplingParams(max_tokens=40, seed=1, ignore_eos=True)), 0.0
    )
    while core.has_work:
        for _, deltas in core.step():
            output += [token for delta in deltas for token in delta.token_ids]
    return output


class TestDraftModels:
    @pytest.mark.parametrize("kind", ["model", "auto"])
    @pytest.mark.parametrize("name", ["target", "draft", "padded", "short"])
    def test_any_with_the_targets_vocabulary_will_do(self, folders: dict[str, Path], name: str, kind: str) -> None:
        plain = generate(load(folders, {"kind": "none"}).core)
        engine = load(folders, {"kind": kind, "model": str(folders[name]), "draft_length": 4})
        assert "model" in engine.limits.drafters
        assert generate(engine.core) == plain
        stats = engine.core.stats()
        assert stats.num_drafted_tokens > 0
        assert (stats.num_accepted_tokens == stats.num_drafted_tokens) == (name == "target")
        if name == "short" and kind == "model":
            assert stats.num_drafted_tokens < 21 * 4, "none beyond its last position"

    def test_fewer_logits_than_tokens_are_refused(self, folders: dict[str, Path]) -> None:
        with pytest.raises(VocabularyMismatchError, match="64 logits for 96 tokens"):
            load(folders, {"kind": "model", "model": str(folders["cut"])})

    def test_only_as_many_logits_as_the_target_has_are_needed(self, folders: dict[str, Path]) -> None:
        own = folders | {"target": folders["cut"]}
        engine = load(own, {"kind": "model", "model": str(folders["cut"]), "draft_length": 4})
        assert engine.limits.vocab_size == 64
        generate(engine.core)
        stats = engine.core.stats()
        assert stats.num_accepted_tokens == stats.num_drafted_tokens > 0

    def test_another_vocabulary_is_refused_at_load(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = tiny_models.save(tiny_models.SUPPORTED["llama"](), tmp_path)
        tokenizer = json.loads((folders["target"] / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["A"], words["B"] = words["B"], words["A"]
        character_tokenizer().save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(VocabularyMismatchError, match=r"96 tokens.*draft 96.*which is 'A' to the target and 'B'"):
            load(folders, {"kind": "auto", "model": str(folder)})

    def test_both_models_share_the_memory_of_a_block(self, folders: dict[str, Path]) -> None:
        alone = load(folders, {"kind": "none"}).limits.num_blocks
        beside = load(folders, {"kind": "model", "model": str(folders["target"])}).limits.num_blocks
        assert beside == pytest.approx(alone / 2, abs=1)


class TestCosts:
    def test_that_they_cannot_be_kept_is_said_once(
        self, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        engine = load(folders, {"kind": "ngram"}, costs_file=str(tmp_path / "file" / "costs.json"))
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            for _ in range(3):
                engine.keep()
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.DEBUG, logging.DEBUG]

    def test_engines_of_another_speed_keep_their_own(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        for optimize in (True, False, True):
            load(folders, {"kind": "ngram"}, costs_file=None, optimize=optimize).keep()
        assert len(list(tmp_path.rglob("*.json"))) == 2
        monkeypatch.setattr("engines.build._processor", lambda: "another")
        load(folders, {"kind": "ngram"}, costs_file=None, optimize=True).keep()
        assert len(list(tmp_path.rglob("*.json"))) == 3
