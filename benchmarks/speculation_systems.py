"""What `benchmarks.speculation` measures: our engine under one drafter and length, and transformers' assistants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoModelForCausalLM

from benchmarks.workloads import Prompt
from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.draft_model import DraftModel
from drafting.prices import Prices
from drafting.speculator import Speculator
from drafting.suffix import SuffixDrafter
from engines.build import load_engine
from engines.config import LocalEngineConfig
from engines.drafters import make_policy
from engines.types import DrafterChoice, GenerateRequest, SamplingParams, SpeculationParams, TokenPrompt

Length = int | Literal["adaptive"]
_LOOKUP_TOKENS = 10  # the most that one of transformers' lookups drafts
_ROOM = 64  # tokens that a sequence may be ahead of the average when the clock stops


@dataclass(frozen=True, slots=True)
class Setting:
    """What a system is to do: sequences at once are the prompts it is given."""

    drafter: DrafterChoice
    length: Length
    temperature: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Decoding only, all sequences running: from when each has its first token until enough were emitted."""

    num_tokens: int
    num_steps: int
    num_sequences: int
    seconds: float
    num_drafted: int = 0
    num_accepted: int = 0


class Peer(Protocol):
    """Another system, which decodes one sequence at a time: its rows' names, and how many tokens it drafts."""

    name: str
    drafter: str
    length: Length

    def run(self, prompts: Sequence[Prompt], temperature: float, num_new: int) -> Measured: ...


class Outrider:
    """The engine's step loop, driven directly: scheduling, drafting, sampling and detokenizing are inside the figure.

    The prompts' prefixes stay cached, so that a run begins with decoding. Costs and acceptance rates are learnt
    throughout, as a server learns them; past outputs are forgotten before each run, since the same prompts come again.
    With `is_cold`, each run starts from nothing, as the first one of a server does.
    """

    name = "outrider"

    def __init__(self, target: Path, draft: Path, threads: int, max_num_seqs: int, *, is_cold: bool = False) -> None:
        self._is_cold = is_cold
        config = LocalEngineConfig.model_validate(
            {
                "model": str(target),
                "num_threads": threads,
                "kv_cache_bytes": 3 << 30,
                "max_num_seqs": max_num_seqs,
                "drafter": {"kind": "auto", "model": str(draft), "share_unsalted": True},
                "costs_file": "",
            }
        )
        loaded = load_engine(config)
        self._core = loaded.core
        self._speculator = loaded.speculator

    def run(self, prompts: Sequence[Prompt], setting: Setting, num_new: int) -> Measured:
        """Decode `num_new` tokens for each prompt, on average, all at once."""
        if self._is_cold:
            self._forget()
        self._speculator.policy = make_policy(setting.length)
        self._speculator.lookups["suffix"] = SuffixDrafter()
        for key, prompt in enumerate(prompts):
            self._core.add(key, self._request(key, prompt, setting, num_new), time.monotonic())
        begun: set[int] = set()
        while len(begun) < len(prompts):
            begun.update(key for key, _ in self._core.step())
        before, started = self._core.stats(), time.perf_counter()
        num_tokens = 0
        while num_tokens < num_new * len(prompts):
            num_tokens += sum(len(delta.token_ids) for _, deltas in self._core.step() for delta in deltas)
        seconds = time.perf_counter() - started
        after = self._core.stats()
        for key in range(len(prompts)):
            self._core.abort(key)
        return Measured(
            num_tokens,
            after.num_steps - before.num_steps,
            len(prompts),
            seconds,
            after.num_drafted_tokens - before.num_drafted_tokens,
            after.num_accepted_tokens - before.num_accepted_tokens,
        )

    def _forget(self) -> None:
        """Another speculator over the same draft model."""
        learnt = self._speculator
        prices = Prices(StepCost(), StepCost())
        acceptance = {source: Acceptance() for source in learnt.sources}
        assert learnt._model is not None
        model = DraftModel(learnt._model._reader, acceptance["model"], prices.draft)
        self._speculator = Speculator(learnt.policy, learnt.lookups, model, acceptance, prices)
        self._core._speculation.speculator = self._speculator

    def _request(self, index: int, prompt: Prompt, setting: Setting, num_new: int) -> GenerateRequest:
        is_predicted = setting.drafter in ("prediction", "auto") and prompt.prediction
        return GenerateRequest(
            request_id=str(index),
            prompt=TokenPrompt(prompt.token_ids),
            sampling=SamplingParams(
                max_tokens=num_new * 4 + _ROOM, temperature=setting.temperature, seed=index, ignore_eos=True
            ),
            speculation=SpeculationParams(drafter=setting.drafter),
            prediction=TokenPrompt(prompt.prediction) if is_predicted and prompt.prediction else None,
        )


class Assisted:
    """transformers' assisted generation, which takes one sequence at a time; with `draft`, else by prompt lookup."""

    def __init__(self, target: Any, draft: Any | None = None) -> None:
        self.name = "transformers_assisted" if draft is not None else "transformers_prompt_lookup"
        self.drafter = "model" if draft is not None else "ngram"
        self.length: Length = "adaptive" if draft is not None else _LOOKUP_TOKENS
        self._target = target
        self._options: dict[str, Any] = (
            {"assistant_model": draft} if draft is not None else {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
        )

    def run(self, prompts: Sequence[Prompt], temperature: float, num_new: int) -> Measured:
        """Decode `num_new` tokens for each prompt, one prompt after another; prefill is timed apart and taken off."""
        seconds = sum(self._decode_s(prompt, temperature, num_new) for prompt in prompts)
        return Measured(num_new * len(prompts), 0, 1, seconds)

    def _decode_s(self, prompt: Prompt, temperature: float, num_new: int) -> float:
        return self._generate_s(prompt, temperature, num_new + 1) - self._generate_s(prompt, temperature, 1, plain=True)

    def _generate_s(self, prompt: Prompt, temperature: float, num_new: int, *, plain: bool = False) -> float:
        ids = torch.tensor([prompt.token_ids])
        # All of the distribution, as the engine samples it: transformers would take the 50 likeliest tokens.
        law = {"temperature": temperature, "top_k": 0}
        sampling = {"do_sample": True, **law} if temperature else {"do_sample": False}
        torch.manual_seed(0)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                eos_token_id=None,
                **sampling,
                **({} if plain else self._options),
            )
        assert output.shape[1] == ids.shape[1] + num_new
        return time.perf_counter() - started


class Plain(Assisted):
    """transformers' generate without an assistant."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.name, self.drafter, self.length, self._options = "transformers", "none", 0, {}


def assistants(target: Path, draft: Path) -> list[Assisted]:
    """transformers' ways to decode one sequence: plain, with the draft model, with prompt lookup."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    small: Any = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.bfloat16)
    return [Plain(loaded), Assisted(loaded, small), Assisted(loaded)]
