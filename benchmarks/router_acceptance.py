"""What the acceptance of speculative decoding is worth as a label that costs nothing.

The tables of outcomes carry no acceptance, so it is measured on the demo fleet: the target writes after code that none
of its models was trained on, and the share of its greedy tokens that the draft model would have proposed is the
acceptance that a log would hold. How good a model is at a prompt is the mean probability that it gives to the next
tokens of the real text; strong is the target, weak the int8 mid-size model. Then, on modules' last thirds:

- hindsight: prompts ordered by their own acceptance, lowest first. No router can do better with this label alone.
- learnt: `train` with acceptance of every prompt, with true labels of some, and with both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.workloads import held_out_documents
from demo.model import WEIGHTS_FILE, generate
from demo.quantize import dequantize
from router_models.data import Group
from router_models.features import Features, extract
from router_models.metrics import Pair, apgr_exact, apgr_standard_error
from router_models.prompt import Prompt
from router_models.router import Router
from router_models.train import train

Array = NDArray[np.float64]

_MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"
_STRONG, _WEAK, _ACCEPTANCE = "target", "mid", "acceptance"
_PROMPT_TOKENS, _NEXT_TOKENS, _STRIDE = 96, 32, 48
_BATCH = 32
_TEST_SHARE = 1 / 3
_LABELS = (100, 300)


@dataclass(frozen=True, eq=False, slots=True)
class Windows:
    """Code and what really follows: ids [num_windows, 96 + 32]; which windows are for testing, bool [num_windows]."""

    token_ids: torch.Tensor
    is_test: NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Outcomes:
    """Of each window: the models' mean probability of what follows, and the draft's acceptance; float64 in [0, 1]."""

    strong: Array
    weak: Array
    acceptance: Array


def measure(max_windows: int = 2000) -> dict[str, Any]:
    """Rank correlations, and exact APGR of each way to use acceptance beside true labels."""
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(_MODELS / _STRONG))
    windows = _windows(tokenizer, max_windows)
    found = _outcomes(windows)
    prompts = tuple(Prompt.from_text(text) for text in tokenizer.batch_decode(windows.token_ids[:, :_PROMPT_TOKENS]))
    test = np.flatnonzero(windows.is_test)
    pair = Pair(found.strong[test], found.weak[test])
    scores = {"hindsight": -found.acceptance[test], **_learnt(prompts, found, windows.is_test)}
    return {
        "num_windows": len(prompts),
        "num_test": len(test),
        "mean": {name: float(getattr(found, name).mean()) for name in ("strong", "weak", "acceptance")},
        "rank_correlation": _correlations(found),
        "apgr_exact": {name: apgr_exact(score, pair) for name, score in scores.items()},
        "apgr_stderr": {name: apgr_standard_error(score, pair) for name, score in scores.items()},
    }


def _windows(tokenizer: PreTrainedTokenizerFast, most: int) -> Windows:
    """Evenly over the modules; the last third of each module is for testing, with a gap of one window before it."""
    rows, is_test = [], []
    for document in held_out_documents():
        token_ids = tokenizer.encode(document.text)
        boundary = int(len(token_ids) * (1 - _TEST_SHARE))
        for start in range(0, len(token_ids) - _PROMPT_TOKENS - _NEXT_TOKENS, _STRIDE):
            end = start + _PROMPT_TOKENS + _NEXT_TOKENS
            if end <= boundary or start >= boundary:
                rows.append(token_ids[start:end])
                is_test.append(start >= boundary)
    kept = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    return Windows(torch.tensor([rows[i] for i in kept]), np.array(is_test)[kept])


def _outcomes(windows: Windows) -> Outcomes:
    models = {name: _load(name) for name in (_STRONG, _WEAK, "draft")}
    parts = [_of_batch(models, batch) for batch in torch.split(windows.token_ids, _BATCH)]
    strong, weak, acceptance = (np.concatenate([part[i] for part in parts]).astype(np.float64) for i in range(3))
    return Outcomes(strong, weak, acceptance)


@torch.inference_mode()
def _of_batch(models: dict[str, LlamaForCausalLM], token_ids: torch.Tensor) -> tuple[NDArray[np.float32], ...]:
    written = generate(models[_STRONG], token_ids[:, :_PROMPT_TOKENS], _NEXT_TOKENS)
    proposed = cast(torch.Tensor, models["draft"](input_ids=written).logits)[:, _PROMPT_TOKENS - 1 : -1].argmax(-1)
    acceptance = proposed.eq(written[:, _PROMPT_TOKENS:]).float().mean(1)
    return tuple(part.numpy() for part in (*(_mean_prob(models[n], token_ids) for n in (_STRONG, _WEAK)), acceptance))


def _mean_prob(model: LlamaForCausalLM, token_ids: torch.Tensor) -> torch.Tensor:
    """Mean probability of the last tokens of each row: float32 [batch]."""
    logits = cast(torch.Tensor, model(input_ids=token_ids).logits)[:, _PROMPT_TOKENS - 1 : -1]
    return logits.softmax(-1).gather(2, token_ids[:, _PROMPT_TOKENS:, None]).squeeze(2).mean(1)


def _load(name: str) -> LlamaForCausalLM:
    if name != _WEAK:
        return LlamaForCausalLM.from_pretrained(_MODELS / name, dtype=torch.float32)
    config = json.loads((_MODELS / name / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    stored = load_file(_MODELS / name / WEIGHTS_FILE)
    weights = {
        key: dequantize(value, stored[f"{key}_scale"]) if f"{key}_scale" in stored else value.float()
        for key, value in stored.items()
        if not key.endswith("_scale")
    }
    missing = model.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"{name}: weights do not fit, {missing}")
    return model


def _correlations(found: Outcomes) -> dict[str, float]:
    """Spearman's, of acceptance with each model's quality and with the gap between them."""
    columns = {"strong": found.strong, "weak": found.weak, "gap": found.strong - found.weak}
    return {name: float(spearmanr(found.acceptance, column).statistic) for name, column in columns.items()}


def _learnt(prompts: Sequence[Prompt], found: Outcomes, is_test: NDArray[np.bool_]) -> dict[str, Array]:
    features = extract(prompts)
    rows, test = np.flatnonzero(~is_test), features.take(np.flatnonzero(is_test))
    router = _trained(prompts, features, {_ACCEPTANCE: found.acceptance}, rows)
    scores = {"acceptance_only": -router.predict(test, router.candidates([_ACCEPTANCE])).prob_right[:, 0]}
    for count, uses_acceptance in _settings(len(rows)):
        labelled = np.random.default_rng(0).permutation(rows)[:count]
        columns = {_STRONG: _only(found.strong, labelled), _WEAK: _only(found.weak, labelled)}
        if uses_acceptance:
            columns[_ACCEPTANCE] = found.acceptance
        router = _trained(prompts, features, columns, rows if uses_acceptance else labelled)
        need = router.predict(test, router.candidates([_STRONG, _WEAK])).need
        scores[f"{count}_labels" + ("_and_acceptance" if uses_acceptance else "")] = need
    return scores


def _settings(num_rows: int) -> Iterator[tuple[int, bool]]:
    yield from ((count, uses) for count in _LABELS if count < num_rows for uses in (False, True))
    yield num_rows, False
    yield num_rows, True


def _only(values: Array, rows: NDArray[np.intp]) -> Array:
    kept = np.full(len(values), np.nan)
    kept[rows] = values[rows]
    return kept


def _trained(
    prompts: Sequence[Prompt], features: Features, columns: dict[str, Array], rows: NDArray[np.intp]
) -> Router:
    everything = Group(
        source="code",
        ids=tuple(map(str, range(len(prompts)))),
        prompts=tuple(prompts),
        subset=np.full(len(prompts), ""),
        models=tuple(columns),
        results=np.column_stack(list(columns.values())),
    )
    return train([everything.take(rows)], features=[features.take(rows)]).router


if __name__ == "__main__":
    print(json.dumps(measure()))
