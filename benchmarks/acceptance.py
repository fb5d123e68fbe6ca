"""What the one rule of verification costs: its acceptance beside the ratio test, block verification, greedy drafts.

    python -m benchmarks.acceptance --json

The demo target writes after held-out prompts, sampled as the engine samples; the demo draft model, with the same
temperature and top-p, is asked at every position. What each rule accepts then follows exactly
(`benchmarks.verification_rules`), for all rules on the same texts:

- coupled: the engine's rule. Drafter and target sample with the same noise; a draft is kept while it equals the sample.
- ratio: the ratio test (arXiv 2211.17192). A token is accepted with probability 1 - TV, which no rule that judges
  tokens one by one can exceed.
- block: block verification (arXiv 2403.10444), the most that any rule can get out of one draft.
- greedy: the drafter proposes its most likely token; it is kept while it equals the target's sample.

The coupling's theoretical floor is (1 - TV) / (1 + TV) a token (arXiv 2408.07978).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.environment import describe
from benchmarks.target_text import Text, write
from benchmarks.verification_rules import (
    Estimate,
    StepCounts,
    block_survival,
    chain_survival,
    count_steps,
    ratio_of_sums,
)
from benchmarks.workloads import Prompt, Workload, prompts
from engines.logits import floors, is_greedy, scale
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams

Rule = Literal["coupled", "ratio", "block", "greedy"]
RULES: tuple[Rule, ...] = ("coupled", "ratio", "block", "greedy")
_MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"
_WORKLOADS: tuple[Workload, ...] = ("code", "chat")
_BATCH = 32
_console = Console(stderr=True, width=120)


@dataclass(frozen=True, slots=True)
class Positions:
    """The two laws compared along one text, one entry a position, float64 [length] each.

    `ratios` are q / p of the text's token; `coupled` and `greedy` are 1.0 where that draft equals the text's token.
    """

    ratios: Tensor
    total_variation: Tensor
    coupled: Tensor
    greedy: Tensor

    def survival(self, rule: Rule, draft_length: int) -> Tensor:
        """[length, draft_length + 1], as `chain_survival` describes it."""
        if rule == "block":
            return block_survival(self.ratios, draft_length)
        accept = {"coupled": self.coupled, "ratio": self.ratios.clamp(max=1.0), "greedy": self.greedy}[rule]
        return chain_survival(accept, draft_length)


@torch.inference_mode()
def compare(text: Text, drafter: LlamaForCausalLM, params: SamplingParams) -> Positions:
    """What `drafter` would have drafted along `text`, which was sampled with the same `params`."""
    start = len(text.prompt)
    context = torch.tensor([[*text.prompt, *text.token_ids[:-1]]])
    draft_logits = cast(Tensor, drafter(input_ids=context, use_cache=False).logits)[0, start - 1 :].float()
    rows = [SampleRow(params, text.seed, start + i, i) for i in range(len(text.token_ids))]
    drafts = torch.tensor([token.token_id for token in Sampler().sample(draft_logits, rows)])
    target_probs, draft_probs = law(text.logits, params), law(draft_logits, params)
    emitted = torch.tensor(text.token_ids)
    of_emitted = (probs.gather(1, emitted[:, None])[:, 0] for probs in (draft_probs, target_probs))
    return Positions(
        ratios=torch.div(*of_emitted),
        total_variation=(target_probs - draft_probs).abs().sum(1) / 2,
        coupled=(drafts == emitted).double(),
        greedy=(draft_logits.max(1).indices == emitted).double(),
    )


def law(logits: Tensor, params: SamplingParams) -> Tensor:
    """The law that `params` make of each row of `logits` [num_rows, vocab]: float64 probabilities."""
    scores = scale(logits.clone(), torch.full((len(logits),), params.temperature))
    scores.masked_fill_(scores < floors(scores, [params] * len(logits))[:, None], float("-inf"))
    return scores.double().softmax(-1)


def step_rows(positions: Sequence[Positions], draft_lengths: Iterable[int]) -> list[dict[str, Any]]:
    """A row per rule and draft length: tokens a step, accepted share of drafts, tokens a step beside the ratio test."""
    rows = []
    for draft_length in draft_lengths:
        counts = {rule: [count_steps(p.survival(rule, draft_length)) for p in positions] for rule in RULES}
        for rule in RULES:
            rows.append({"rule": rule, "draft_length": draft_length, **_step_row(counts[rule], counts["ratio"])})
    return rows


def _step_row(counts: Sequence[StepCounts], of_ratio_test: Sequence[StepCounts]) -> dict[str, float]:
    steps = [count.steps for count in counts]
    estimates = {
        "tokens_per_step": ratio_of_sums([count.tokens for count in counts], steps),
        "acceptance_rate": ratio_of_sums([c.accepted for c in counts], [c.drafted for c in counts]),
        "beside_ratio_test": ratio_of_sums([count.steps for count in of_ratio_test], steps),
    }
    return _flat(estimates)


def position_row(positions: Sequence[Positions]) -> dict[str, float | int]:
    """Means over positions: the chance that a draft is accepted where the drafter saw the target's own text."""
    lengths = [len(p.ratios) for p in positions]
    values = {
        "one_minus_tv": [1 - p.total_variation for p in positions],
        "coupled": [p.coupled for p in positions],
        "coupled_floor": [(1 - p.total_variation) / (1 + p.total_variation) for p in positions],
        "greedy": [p.greedy for p in positions],
    }
    sums = {name: [part.sum().item() for part in parts] for name, parts in values.items()}
    return {"positions": sum(lengths), **_flat({name: ratio_of_sums(each, lengths) for name, each in sums.items()})}


def _flat(estimates: dict[str, Estimate]) -> dict[str, float]:
    flat = {}
    for name, estimate in estimates.items():
        flat[name] = round(estimate.value, 5)
        flat[f"{name}_se"] = round(estimate.standard_error, 5)
    return flat


def _batches(starts: Sequence[Prompt]) -> list[tuple[int, Sequence[Prompt]]]:
    """Each with the index of its first prompt."""
    return [(first, starts[first : first + _BATCH]) for first in range(0, len(starts), _BATCH)]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def measure(
    laws: Sequence[SamplingParams], num_prompts: int, max_draft_length: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `position_row` and `step_rows`, for each workload and law, of the demo pair in float32."""
    target, drafter = (
        LlamaForCausalLM.from_pretrained(_MODELS / name, dtype=torch.float32) for name in ("target", "draft")
    )
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(_MODELS / "target"))
    settings = [(workload, params) for workload in _WORKLOADS for params in laws]
    means, runs = [], []
    for workload, params in track(settings, console=_console, description="writing"):
        positions = [
            compare(text, drafter, params)
            for first, batch in _batches(prompts(workload, tokenizer, num_prompts))
            for text in write(target, batch, params, first)
        ]
        setting = {"workload": workload, "temperature": params.temperature, "top_p": params.top_p}
        means.append(setting | position_row(positions))
        runs += [setting | row for row in step_rows(positions, range(1, max_draft_length + 1))]
    return means, runs


def main(
    temperature: Annotated[str, typer.Option(help="comma-separated, each above 0")] = "0.7,1.0",
    top_p: Annotated[str, typer.Option(help="comma-separated")] = "1.0,0.95",
    num_prompts: Annotated[int, typer.Option(min=2, help="prompts of each workload")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens written after each")] = 128,
    max_draft_length: Annotated[int, typer.Option(min=1)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Compare the rules on the demo pair's real distributions."""
    laws = [
        SamplingParams(max_tokens=max_tokens, temperature=heat, top_p=mass)
        for heat in _numbers(temperature)
        for mass in _numbers(top_p)
    ]
    if any(map(is_greedy, laws)):
        raise typer.BadParameter("without randomness there is one rule: a temperature or a top-p is too small")
    means, runs = measure(laws, num_prompts, max_draft_length)
    _print_positions(means)
    _print_steps(runs)
    if as_json:
        size = {"prompts_per_workload": num_prompts, "max_tokens": max_tokens}
        print(json.dumps({"environment": describe() | size, "positions": means, "runs": runs}))


def _print_positions(rows: list[dict[str, Any]]) -> None:
    names = ("one_minus_tv", "coupled", "coupled_floor", "greedy")
    table = Table("workload", "T", "top-p", *names, title="acceptance of one draft (standard error)")
    for row in rows:
        table.add_row(
            row["workload"],
            str(row["temperature"]),
            str(row["top_p"]),
            *(f"{row[name]:.3f} ({row[name + '_se']:.3f})" for name in names),
        )
    _console.print(table)


def _print_steps(rows: list[dict[str, Any]]) -> None:
    table = Table("workload", "T", "top-p", "drafts", *RULES, title="tokens a step (beside the ratio test)")
    keys = ("workload", "temperature", "top_p", "draft_length")
    by_load: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_load.setdefault(tuple(row[key] for key in keys), {})[row["rule"]] = row
    for load, by_rule in by_load.items():
        cells = [f"{by_rule[rule]['tokens_per_step']:.3f} ({by_rule[rule]['beside_ratio_test']:.3f})" for rule in RULES]
        table.add_row(*map(str, load), *cells)
    _console.print(table)


if __name__ == "__main__":
    typer.run(main)
