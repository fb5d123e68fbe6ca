from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.attention import AttentionBackend, resolve_kv_dtype, select_backend
from engines.attention.batched import SHORT_QUERY_ROWS, BatchedAttention
from engines.attention.int8_kv import SCALE_BYTES, dequantize, quantize, stored_dim, vector_dim, write
from engines.attention.native import NativeAttention
from engines.attention.reference import ReferenceAttention
from engines.batch import BatchItem, build_batch
from engines.build import load_engine
from engines.config import LocalEngineConfig
from engines.errors import ModelLoadError, UnsupportedModelError
from engines.loading import LoadedModel
from engines.local import LocalEngine
from engines.model_runner import ModelRunner
from engines.native.library import ISA_NAMES, isa_limited_to, library
from engines.parity import compare, expect
from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from tests.engines import tiny_models
from tests.engines.engine_contract import collect
from tests.engines.test_attention import MIXED, OPTIONS, Case, make_case
from tests.engines.tokenizers import character_tokenizer

CPU = torch.device("cpu")
BLOCK_SIZE = 4
needs_kernels = pytest.mark.skipif(library() is None, reason="the CPU kernels are not built")
BACKENDS = [ReferenceAttention, BatchedAttention, pytest.param(NativeAttention, marks=needs_kernels)]


def int8_case(lens: list[tuple[int, int]], **options: Any) -> Case:
    """make_case with caches in int8; unwritten slots have a scale of NaN."""
    case = make_case(lens, **({"dims": (64, 64)} | options))
    case.key_cache, case.value_cache = quantize(case.key_cache), quantize(case.value_cache)
    return case


class TestVectors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_each_number_is_off_by_half_a_scale_of_its_own_vector(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(50, 3, 24, generator=generator) * torch.logspace(-6, 6, 50).view(-1, 1, 1)
        vectors = vectors.to(dtype)
        stored = quantize(vectors)
        assert stored.shape == (50, 3, 24 + SCALE_BYTES)
        assert stored.dtype == torch.int8
        error = (dequantize(stored, torch.float32) - vectors.float()).abs()
        half_scale = vectors.float().abs().amax(-1, keepdim=True) / 127 / 2
        assert (error <= half_scale * (1 + 1e-5)).all()

    def test_zero_stays_zero_and_nan_stays_nan(self) -> None:
        vectors = torch.zeros(2, 8)
        vectors[1, 3] = torch.nan
        assert not dequantize(quantize(vectors), torch.float32)[0].any()
        assert dequantize(quantize(vectors), torch.float32)[1].isnan().all()

    def test_other_dtypes_are_left_alone(self) -> None:
        cache = torch.zeros(2, 4, 1, 8)
        vectors = torch.randn(3, 1, 8)
        write(cache, torch.tensor([1, 4, 7]), vectors)
        assert torch.equal(cache.flatten(0, 1)[[1, 4, 7]], vectors)
        assert dequantize(cache, torch.float32) is cache
        assert vector_dim(cache) == stored_dim(8, torch.float32) == 8
        assert vector_dim(quantize(cache)) == 8
        assert stored_dim(8, torch.int8) == 12


class TestBackends:
    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
    @pytest.mark.parametrize("backend", BACKENDS[1:])
    def test_equal_the_reference(self, backend: type[AttentionBackend], options: dict[str, Any]) -> None:
        assert any(q_len > SHORT_QUERY_ROWS for q_len, _ in MIXED)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            case = int8_case(MIXED, dtype=dtype)
            options = {"scaling": 0.125} | options
            output, expected = (case.attend(each, **options) for each in (backend(), ReferenceAttention()))
            torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_stay_within_two_percent_of_unquantized_caches(self, backend: type[AttentionBackend]) -> None:
        expected = make_case(MIXED, dims=(64, 64)).attend(ReferenceAttention(), scaling=0.125)
        output = int8_case(MIXED).attend(backend(), scaling=0.125)
        assert torch.linalg.vector_norm(output - expected) < 0.02 * torch.linalg.vector_norm(expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_write_the_same_bytes_and_no_others(self, backend: type[AttentionBackend]) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            case = int8_case(MIXED, dims=(24, 16), dtype=dtype)
            case.key[0], case.value[1] = 0.0, 1e-30
            caches = case.key_cache, case.value_cache
            expected = [cache.clone() for cache in caches]
            for cache, vectors in zip(expected, (case.key, case.value), strict=True):
                cache.flatten(0, 1)[case.batch.slot_mapping] = quantize(vectors)
            options = {"scaling": 1.0, "sliding_window": None, "softcap": None, "sinks": None}
            backend().attend(case.query, case.key, case.value, *caches, case.batch, **options)
            assert all(torch.equal(cache, wanted) for cache, wanted in zip(caches, expected, strict=True))

    def test_a_prompt_reads_what_the_cache_has_not_what_it_brought(self) -> None:
        case = int8_case([(SHORT_QUERY_ROWS + 1,) * 2])
        whole = case.attend(BatchedAttention(), scaling=0.125)
        torch.testing.assert_close(whole, case.attend(ReferenceAttention(), scaling=0.125), atol=1e-5, rtol=1e-5)


@needs_kernels
class TestKernels:
    @pytest.mark.parametrize("isa", ISA_NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_every_instruction_set(self, isa: str, dtype: torch.dtype) -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        with isa_limited_to(isa):
            for dims in ((64, 64), (72, 40), (8, 24), (128, 128)):
                case = int8_case(MIXED, heads=(5, 1), dims=dims, dtype=dtype, block_size=16)
                output, expected = (case.attend(each, window=50) for each in (NativeAttention(), ReferenceAttention()))
                torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize("isa", ISA_NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_are_independent(self, isa: str, dtype: torch.dtype) -> None:
        lens = [(1, 300), (5, 261), (33, 140), (70, 200)]
        with isa_limited_to(isa):
            together = int8_case(lens, dims=(80, 40), dtype=dtype).attend(NativeAttention())
            for index, part in enumerate(together.split([q_len for q_len, _ in lens])):
                alone = int8_case(lens, dims=(80, 40), dtype=dtype, keep=[index])
                assert torch.equal(alone.attend(NativeAttention()), part)


class TestModels:
    """Logits of tiny models. Their random weights spread attention wide, as trained ones do not."""

    TOKENS = tuple((7 * i) % 89 + 3 for i in range(40))

    def logits(self, loaded: LoadedModel, backend: AttentionBackend, steps: list[int], int8: bool) -> Tensor:
        """Of all rows, the tokens being served in steps of the given numbers of rows."""
        num_blocks = -(-len(self.TOKENS) // BLOCK_SIZE)
        runner = ModelRunner(loaded, backend, num_blocks, BLOCK_SIZE, torch.int8 if int8 else None)
        rows, start = [], 0
        for count in steps:
            item = BatchItem(self.TOKENS, start, start + count, (), array("i", range(num_blocks)), count)
            rows.append(runner.forward(build_batch([item], BLOCK_SIZE, CPU)))
            start += count
        return torch.cat(rows)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
    def test_logits_stay_within_three_percent(self, name: str, backend: type[AttentionBackend]) -> None:
        loaded = tiny_models.load(name)
        plain, int8 = (self.logits(loaded, backend(), [20, 1, 1, 5, 13], int8) for int8 in (False, True))
        errors = torch.linalg.vector_norm(int8 - plain, dim=1) / torch.linalg.vector_norm(plain, dim=1)
        assert 0 < errors.median() < 0.03

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_verified_token_is_the_decoded_one(self, backend: type[AttentionBackend]) -> None:
        loaded = tiny_models.load("llama")
        decoded = self.logits(loaded, backend(), [10] + [1] * 30, int8=True)
        for steps in ([10, 5, 5, 5, 5, 5, 5], [10, 30], [40]):
            assert torch.equal(self.logits(loaded, backend(), steps, int8=True).argmax(1), decoded.argmax(1))

    def test_memory_is_what_is_planned(self) -> None:
        loaded = tiny_models.load("llama")
        runner = ModelRunner(loaded, select_backend("torch", CPU), 5, BLOCK_SIZE, torch.int8)
        planned = ModelRunner.bytes_per_block(loaded, BLOCK_SIZE, torch.int8)
        assert sum(cache.nbytes for cache in runner.kv_tensors) == 5 * planned
        spec = loaded.layers[0]
        assert spec is not None
        stored = spec.num_kv_heads * (spec.head_dim + spec.value_head_dim + 2 * SCALE_BYTES)
        assert planned == BLOCK_SIZE * stored * len([layer for layer in loaded.layers if layer is not None])


class TestProbe:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_supported_models_pass_within_its_own_bound(
        self, dtype: torch.dtype, backend: type[AttentionBackend]
    ) -> None:
        for name in tiny_models.SUPPORTED:
            loaded = tiny_models.load(name, dtype=dtype)
            report = compare(loaded, backend(), expect(loaded), torch.int8)
            assert max(report.errors.values()) < report.tolerance == 0.25

    def test_a_backend_that_forgets_the_scales_is_caught(self) -> None:
        class Scaleless(ReferenceAttention):
            def attend(self, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
                return super().attend(query, key, value.sign() * value.abs().amax(), *others, **options)

        loaded = tiny_models.load("llama")
        with pytest.raises(UnsupportedModelError, match="differs from its own eager output"):
            compare(loaded, Scaleless(), expect(loaded), torch.int8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save(tiny_models.SUPPORTED["llama"](), tmp_path_factory.mktemp("llama"))
    character_tokenizer().save_pretrained(folder)
    return folder


class TestEngine:
    def config(self, checkpoint: Path, **settings: Any) -> LocalEngineConfig:
        small = {"kv_cache_bytes": 1 << 20, "num_threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        fields = {"model": str(checkpoint), "device": "cpu", "kv_cache_dtype": "int8", "costs_file": ""}
        return LocalEngineConfig.model_validate(fields | small | settings)

    def test_the_budget_holds_more_blocks_and_the_card_tells(self, checkpoint: Path) -> None:
        cards = [load_engine(self.config(checkpoint, kv_cache_dtype=name)).card for name in ("auto", "int8")]
        blocks = [int(card.details["kv_blocks"].split()[0]) for card in cards]
        assert blocks[1] > 2 * blocks[0]  # float32 heads of 8 numbers: 32 bytes against 12
        assert cards[1].details["kv_cache_dtype"] == "int8"
        assert cards[0].fingerprint != cards[1].fingerprint

    async def test_speculation_gives_the_plain_output(self, checkpoint: Path) -> None:
        outputs = []
        drafters: list[dict[str, Any]] = [
            {"kind": "none"},
            {"kind": "ngram", "draft_length": 4},
            {"kind": "model", "draft_length": 4, "model": str(checkpoint)},
        ]
        for drafter in drafters:
            engine = LocalEngine(self.config(checkpoint, drafter=drafter))
            await engine.start()
            sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
            outcome = await collect(engine, GenerateRequest("r", TokenPrompt((5, 6, 7, 5, 6)), sampling))
            outputs.append(outcome.choices[0].token_ids)
            stats = await engine.stats()
            assert (stats.num_drafted_tokens > 0) == (drafter["kind"] != "none")
            await engine.close()
        assert len(outputs[0]) == 40
        assert outputs[0] == outputs[1] == outputs[2]

    def test_backends_without_it_are_refused_by_name(self) -> None:
        class Other(ReferenceAttention):
            name = "flash"

        assert resolve_kv_dtype("auto", Other()) is None
        assert resolve_kv_dtype("int8", ReferenceAttention()) is torch.int8
        with pytest.raises(ModelLoadError, match=r"'flash' has no int8 KV cache; these have: native, reference, torch"):
            resolve_kv_dtype("int8", Other())
