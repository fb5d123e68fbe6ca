"""What is compared: a model at several precisions of its weights and of its KV cache, each as an engine's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from engines.config import LocalEngineConfig

# In the words of LocalEngineConfig. Quantized weights are computed with in bf16.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
KV_PRECISIONS: dict[str, dict[str, Any]] = {"auto": {}, "int8": {"kv_cache_dtype": "int8"}}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine to be measured. `kv` is "auto" where the cache has the weights' floating-point type."""

    precision: str
    kv: str
    config: LocalEngineConfig

    @property
    def name(self) -> str:
        """As reports call it: "int8", or "int8 + kv int8"."""
        return self.precision if self.kv == "auto" else f"{self.precision} + kv {self.kv}"


def candidates(model: str, precisions: Sequence[str], kv: Sequence[str], device: str = "auto") -> list[Candidate]:
    """Every precision with every kind of KV cache; the first is what the others are compared with.

    Names are those of PRECISIONS and KV_PRECISIONS.
    """
    # Speculation changes no answer, and what it learns about costs here is of no use to a server.
    common: dict[str, Any] = {"model": model, "device": device, "drafter": {"kind": "none"}, "costs_file": ""}
    return [
        Candidate(name, kv_name, LocalEngineConfig.model_validate(common | PRECISIONS[name] | KV_PRECISIONS[kv_name]))
        for name, kv_name in product(precisions, kv)
    ]
