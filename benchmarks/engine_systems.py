"""The systems that `benchmarks.engine` measures, each doing the same work: decode greedily after given prompts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from engines.config import LocalEngineConfig
from engines.local import LocalEngine
from engines.types import GenerateRequest, SamplingParams, TokenPrompt

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: seconds until every sequence had its first token, and from then until all were done."""

    prefill_s: float
    decode_s: float


class System(Protocol):
    """Something that generates `num_new` tokens for each prompt, all at once."""

    name: str

    def run(self, prompts: Prompts, num_new: int) -> Timing: ...

    def close(self) -> None: ...


class Outrider:
    """Our engine through its public protocol: scheduling, sampling, detokenizing and delivery are inside the figure."""

    def __init__(self, model: Path, threads: int, attention_backend: str = "auto", quantization: str = "none") -> None:
        self.name = f"outrider_{quantization}" if quantization != "none" else "outrider"
        config = LocalEngineConfig.model_validate(
            {
                "model": str(model),
                "enable_prefix_caching": False,
                "num_threads": threads,
                "attention_backend": attention_backend,
                "quantization": quantization,
                "kv_cache_bytes": 2 << 30,
                "drafter": {"kind": "none"},  # plain decoding, as the peers do it
            }
        )
        self._loop = asyncio.new_event_loop()
        self._engine = LocalEngine(config)
        self._loop.run_until_complete(self._engine.start())

    def run(self, prompts: Prompts, num_new: int) -> Timing:
        return self._loop.run_until_complete(self._run(prompts, num_new))

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()

    async def _run(self, prompts: Prompts, num_new: int) -> Timing:
        started = time.perf_counter()
        sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)

        async def first_token(index: int, prompt: list[int]) -> float:
            request = GenerateRequest(str(index), TokenPrompt(tuple(prompt)), sampling)
            first = None
            async for _ in self._engine.generate(request):
                first = first or time.perf_counter()
            assert first is not None
            return first

        firsts = await asyncio.gather(*(first_token(i, prompt) for i, prompt in enumerate(prompts)))
        return Timing(max(firsts) - started, time.perf_counter() - max(firsts))


class TransformersGenerate:
    """`generate` with its dynamic cache, SDPA attention and a padded batch (equal lengths here, so no padding)."""

    name = "transformers"

    def __init__(self, model: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    def run(self, prompts: Prompts, num_new: int) -> Timing:
        prefill = self._generate(prompts, 1)
        return Timing(prefill, self._generate(prompts, num_new) - prefill)

    def close(self) -> None:
        del self._model

    def _generate(self, prompts: Prompts, num_new: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
            )
        assert output.shape[1] == ids.shape[1] + num_new
        return time.perf_counter() - started


class TransformersContinuousBatching(TransformersGenerate):
    """`generate_batch`: transformers' own continuous batching over a paged cache; its set-up counts as prefill."""

    name = "transformers_continuous_batching"

    def run(self, prompts: Prompts, num_new: int) -> Timing:
        started = time.perf_counter()
        settings = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        outputs = self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig.from_dict(settings),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=4096),
            record_timestamps=True,
            warmup=False,
        )
        assert len(outputs) == len(prompts)
        assert all(len(output.generated_tokens) == num_new for output in outputs.values())
        firsts = max(output.timestamps[0] for output in outputs.values())
        ends = max(output.timestamps[-1] for output in outputs.values())
        return Timing(firsts - started, ends - firsts)
