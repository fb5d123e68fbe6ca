"""What each optimization of the CPU path gives: milliseconds of one engine step, to its logits.

    python -m benchmarks.step_profile --json

Each stage keeps those before it, and has a model of its own; the stages take turns within each round, so that a machine
whose speed drifts slows all of them. Sampling, scheduling and detokenizing are not in these figures.
"""

from __future__ import annotations

import json
import statistics
import time
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.environment import describe
from benchmarks.random_model import SHAPES, materialize
from engines.attention import AttentionBackend, select_backend
from engines.attention.dispatch import ATTENTION_NAME, AttentionCall, attending, register
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.causal_lm import row_logits
from engines.loading import LoadedModel, inspect_model
from engines.native.threads import reserved_for_kernels
from engines.optimized.decoder_layer import stepping
from engines.optimized.optimize import Kind, optimize

_console = Console(stderr=True, width=140)
_CACHE = Path.home() / ".cache" / "outrider" / "benchmarks"
_BLOCK_SIZE = 32
_CPU = torch.device("cpu")
_MAX_VERIFIED = 16  # beyond so many query tokens a sequence is a prefill, and only its last row is wanted


class Load(NamedTuple):
    """Sequences with so many query tokens each, after `context` tokens that are in the cache already."""

    sequences: int
    query_tokens: int
    context: int


LOADS = (Load(1, 1, 128), Load(4, 1, 128), Load(16, 1, 128), Load(16, 1, 512), Load(16, 5, 128), Load(1, 512, 0))


@dataclass(frozen=True, slots=True)
class StageSpec:
    """An attention backend and the kinds of modules that are exchanged."""

    name: str
    attention: str
    kinds: tuple[Kind, ...]


STAGES = (
    StageSpec("transformers, torch attention", "torch", ()),
    StageSpec("native attention", "native", ()),
    StageSpec("packed linears", "native", ("linears",)),
    StageSpec("native norms", "native", ("linears", "norms")),
    StageSpec("fused MLPs", "native", ("linears", "norms", "mlps")),
    StageSpec("fused attention blocks", "native", ("linears", "norms", "mlps", "attentions")),
    StageSpec("whole layers", "native", ("linears", "norms", "mlps", "attentions", "layers")),
)


class Caches:
    """KV memory that the stages share: they have the same shape, and each writes before it reads."""

    def __init__(self, loaded: LoadedModel, loads: Sequence[Load]) -> None:
        blocks = max(load.sequences * _blocks(load) for load in loads)
        generator = torch.Generator().manual_seed(0)

        def random(heads: int, size: int) -> Tensor:
            return torch.randn(blocks, _BLOCK_SIZE, heads, size, generator=generator).to(loaded.dtype)

        specs = [spec for spec in loaded.layers if spec is not None]
        self.layers = [
            (random(spec.num_kv_heads, spec.head_dim), random(spec.num_kv_heads, spec.value_head_dim)) for spec in specs
        ]


class Stage:
    """A model as far optimized as `spec` says."""

    def __init__(self, spec: StageSpec, path: Path) -> None:
        register()
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=ATTENTION_NAME)
        self.name = spec.name
        self.loaded = inspect_model(model, weights_fingerprint=spec.name)
        self._backend: AttentionBackend = select_backend(spec.attention, _CPU)
        done = optimize(model, spec.kinds)
        # As the engine does it: where torch has next to nothing to do, its threads leave the cores to the kernels.
        self._threads = nullcontext if done.leaves_matrices else reserved_for_kernels
        self._steps = stepping if done.layers else lambda *_: nullcontext()

    def step(self, batch: RaggedBatch, caches: Caches) -> Tensor:
        """Logits of the batch's rows."""

        def attend(call: AttentionCall) -> Tensor:
            key_cache, value_cache = caches.layers[call.layer_idx]
            return self._backend.attend(
                call.query,
                call.key,
                call.value,
                key_cache,
                value_cache,
                batch,
                scaling=call.scaling,
                sliding_window=call.sliding_window,
                softcap=call.softcap,
                sinks=call.sinks,
            )

        with self._threads(), self._steps(batch, caches.layers), attending(attend):
            return row_logits(self.loaded.model, batch.input_ids, batch.positions, batch.logit_rows, selects_rows=True)


def batch_of(load: Load, vocab: int) -> RaggedBatch:
    """Random tokens; each sequence has blocks of its own."""
    end = load.context + load.query_tokens
    ids = torch.randint(vocab, (end,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = load.query_tokens if load.query_tokens <= _MAX_VERIFIED else 1
    blocks = _blocks(load)
    tables = (array("i", range(first * blocks, (first + 1) * blocks)) for first in range(load.sequences))
    items = [BatchItem(ids, load.context, end, (), table, num_logit_rows=rows) for table in tables]
    return build_batch(items, _BLOCK_SIZE, _CPU)


def measure(stages: Sequence[Stage], loads: Sequence[Load], rounds: int, vocab: int) -> dict[Load, dict[str, float]]:
    """Median milliseconds of a step by load and stage; the first turn of each warms up."""
    caches = Caches(stages[0].loaded, loads)
    medians = {}
    for load in track(loads, console=_console, description="measuring"):
        batch = batch_of(load, vocab)
        times: dict[str, list[float]] = {stage.name: [] for stage in stages}
        for turn in range(rounds + 1):
            for stage in stages:
                elapsed = _step_ms(stage, batch, caches)
                if turn:
                    times[stage.name].append(elapsed)
        medians[load] = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return medians


def _step_ms(stage: Stage, batch: RaggedBatch, caches: Caches) -> float:
    started = time.perf_counter()
    stage.step(batch, caches)
    return (time.perf_counter() - started) * 1000


def _blocks(load: Load) -> int:
    return -(-(load.context + load.query_tokens) // _BLOCK_SIZE)


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "qwen3-0.5b",
    rounds: Annotated[int, typer.Option(min=1, help="counted turns of each stage")] = 15,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Measure the stages."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape} is not one of {', '.join(SHAPES)}")
    torch.set_num_threads(threads or torch.get_num_threads())
    path = materialize(shape, _CACHE)
    stages = [Stage(spec, path) for spec in STAGES]
    medians = measure(stages, LOADS, rounds, SHAPES[shape]["vocab_size"])
    rows = _rows(medians)
    _print_table(rows)
    if as_json:
        print(json.dumps({"environment": describe() | {"shape": shape, "rounds": rounds}, "step_ms": rows}))


def _rows(medians: dict[Load, dict[str, float]]) -> list[dict[str, Any]]:
    """A row per stage; a column per load: sequences, query tokens each, context."""
    return [
        {"stage": spec.name} | {",".join(map(str, load)): times[spec.name] for load, times in medians.items()}
        for spec in STAGES
    ]


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    _console.print(table)


if __name__ == "__main__":
    typer.run(main)
