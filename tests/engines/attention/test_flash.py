"""The mapping onto flash-attn, against a flash_attn that does in plain torch what its documentation says."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor

from engines.attention.flash import PAGE_TOKENS, FlashAttention
from engines.attention.reference import ReferenceAttention
from engines.errors import ModelLoadError, UnsupportedModelError
from engines.parity import probe
from tests.engines import tiny_models
from tests.engines.test_attention import SINKS, Case, make_case

MIXED = [(1, 9), (5, 5), (1, 300), (3, 260), (66, 66), (70, 300)]


def masked_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """One sequence by flash-attn's documentation: masks aligned bottom right, a row that sees nothing gives zero."""
    q_len, kv_len = len(query), len(keys)
    i = torch.arange(q_len).unsqueeze(1) + kv_len - q_len
    j = torch.arange(kv_len)
    left, right = window
    seen = (j >= i - left if left >= 0 else torch.ones(q_len, kv_len, dtype=torch.bool)) & (
        j <= i + right if right >= 0 else torch.ones(q_len, kv_len, dtype=torch.bool)
    )
    seen &= ~torch.tensor(causal) | (j <= i)
    group = query.shape[1] // keys.shape[1]
    keys, values = (rows.repeat_interleave(group, 1).float() for rows in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


class FakeFlashAttn(ModuleType):
    """Counts calls; refuses what the real functions refuse."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[str] = []

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
        softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        self.calls.append("with_kvcache")
        assert q.dim() == 4
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        kv = [
            self._paged(caches, table, n)
            for caches, table, n in self._pages(k_cache, v_cache, block_table, cache_seqlens)
        ]
        rows = [
            masked_attention(one, *two, softmax_scale, causal, window_size, softcap)
            for one, two in zip(q, kv, strict=True)
        ]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
        block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        self.calls.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
        q_lens, kv_lens = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert (int(q_lens.max()), int(kv_lens.max())) == (max_seqlen_q, max_seqlen_k)
        assert len(q) == cu_seqlens_q[-1]
        kv = [self._paged(caches, table, n) for caches, table, n in self._pages(k, v, block_table, kv_lens)]
        parts = zip(q.split(q_lens.tolist()), kv, strict=True)
        return torch.cat(
            [masked_attention(one, *two, softmax_scale, causal, window_size, softcap) for one, two in parts]
        )

    def _pages(
        self, k: Tensor, v: Tensor, table: Tensor, lens: Tensor
    ) -> list[tuple[tuple[Tensor, Tensor], Tensor, int]]:
        assert k.shape[1] % PAGE_TOKENS == 0
        assert k.dtype in (torch.bfloat16, torch.float16)
        return [((k, v), row, n) for row, n in zip(table, lens.tolist(), strict=True)]

    def _paged(self, caches: tuple[Tensor, Tensor], table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (cache[table.long()].flatten(0, 1)[:length] for cache in caches)
        return keys, values


def case(lens: list[tuple[int, int]], **options: object) -> Case:
    return make_case(lens, **{"block_size": PAGE_TOKENS, "dtype": torch.float16, **options})


class TestMapping:
    @pytest.mark.parametrize(
        "options",
        [{}, {"window": 1}, {"window": 5}, {"window": 290}, {"softcap": 1.5}, {"window": 7, "softcap": 1.5}],
        ids=str,
    )
    def test_equals_reference(self, options: dict[str, object]) -> None:
        given, package = case(MIXED), FakeFlashAttn()
        expected = given.attend(ReferenceAttention(), **options)
        torch.testing.assert_close(given.attend(FlashAttention(package), **options), expected, rtol=2e-3, atol=2e-3)
        assert package.calls == ["with_kvcache", "varlen"]

    @pytest.mark.parametrize(
        ("lens", "calls"),
        [([(1, 9), (1, 300)], ["with_kvcache"]), ([(5, 9), (5, 300)], ["with_kvcache"]), ([(80, 80)], ["varlen"])],
    )
    def test_one_call_where_one_is_enough(self, lens: list[tuple[int, int]], calls: list[str]) -> None:
        given, package = case(lens), FakeFlashAttn()
        expected = given.attend(ReferenceAttention())
        torch.testing.assert_close(given.attend(FlashAttention(package)), expected, rtol=2e-3, atol=2e-3)
        assert package.calls == calls

    def test_groups_are_rebuilt_for_each_batch(self) -> None:
        backend = FlashAttention(FakeFlashAttn())
        for lens in ([(1, 9), (3, 300)], [(70, 300), (1, 9)], [(2, 2)]):
            given = case(lens)
            expected = given.attend(ReferenceAttention())
            torch.testing.assert_close(given.attend(backend), expected, rtol=2e-3, atol=2e-3)

    def test_a_whole_model_in_blocks_that_it_takes(self) -> None:
        package = FakeFlashAttn()
        report = probe(tiny_models.load("mistral", dtype=torch.bfloat16), FlashAttention(package))
        assert max(report.errors.values()) < report.tolerance
        assert set(package.calls) == {"with_kvcache"}

    @pytest.mark.gpu
    @pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None, reason="no flash-attn on CUDA"
    )
    @pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 1.5}], ids=str)
    def test_the_real_one_equals_reference(self, options: dict[str, object]) -> None:
        given = case(MIXED, dims=(64, 64), device=torch.device("cuda"))
        expected = given.attend(ReferenceAttention(), **options)
        torch.testing.assert_close(given.attend(FlashAttention(), **options), expected, rtol=4e-3, atol=4e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("built", "options", "reason"),
        [
            ({"dtype": torch.float32}, {}, "not in float32"),
            ({"block_size": 16}, {}, "multiple of 256, not 16"),
            ({"block_size": 384}, {}, "multiple of 256, not 384"),
            ({}, {"sinks": SINKS}, "no attention sinks"),
            ({"dims": (16, 8)}, {}, "not 16 and 8"),
            ({"dims": (264, 264)}, {}, "not 264 and 264"),
            ({"dims": (12, 12)}, {}, "not 12 and 12"),
        ],
    )
    def test_what_it_cannot_do(self, built: dict[str, object], options: dict[str, object], reason: str) -> None:
        package = FakeFlashAttn()
        with pytest.raises(UnsupportedModelError, match=reason):
            case([(1, 9)], **built).attend(FlashAttention(package), **options)
        assert not package.calls

    @pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
    def test_a_missing_package_is_named(self) -> None:
        with pytest.raises(ModelLoadError, match="needs the package flash-attn"):
            FlashAttention()
