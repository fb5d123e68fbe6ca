from __future__ import annotations

import pytest

from engines.precision.candidates import KV_PRECISIONS, PRECISIONS, candidates


def test_every_precision_with_every_cache_the_first_first() -> None:
    found = candidates("m", ["bf16", "int8"], ["auto", "int8"])
    assert [candidate.name for candidate in found] == ["bf16", "bf16 + kv int8", "int8", "int8 + kv int8"]
    assert found[0].config.dtype == "bfloat16"
    assert [candidate.config.quantization for candidate in found] == ["none", "none", "int8", "int8"]
    assert [candidate.config.kv_cache_dtype for candidate in found] == ["auto", "int8", "auto", "int8"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kv", KV_PRECISIONS)
def test_every_name_is_a_valid_config(precision: str, kv: str) -> None:
    (candidate,) = candidates("m", [precision], [kv], device="cpu")
    assert (candidate.config.model, candidate.config.device) == ("m", "cpu")
    assert candidate.config.drafter.kind == "none"
    assert candidate.config.costs_file == ""
