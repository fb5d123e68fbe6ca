"""Tokens per second of our engine on a GPU beside transformers, and its share of memory bandwidth at one sequence.

    python -m benchmarks.gpu_engine --shape qwen3-8b --sequences 1,16,64,256 --json

As benchmarks.engine (interleaved rounds, medians, greedy decoding to a fixed length), with the engine in several
settings: an attention backend's name, with "+graphs" for CUDA graphs. Weights are random, made on the device.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.engine import Load, Timings, measure, ratios, rows
from benchmarks.engine_systems import Outrider, Prompts, System, TransformersGenerate
from benchmarks.environment import describe
from benchmarks.random_model import SHAPES, materialize
from engines.config import LocalEngineConfig
from engines.local import LocalEngine

_console = Console(stderr=True, width=140)
_CACHE = Path.home() / ".cache" / "outrider" / "benchmarks"
_BLOCK_SIZE = {"flash": 256}
_COPIED_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}


class OutriderOnDevice(Outrider):
    """Our engine on `device` in a setting such as "torch" or "triton+graphs", with KV memory for the largest load."""

    def __init__(self, name: str, model: Path, device: str, setting: str, loads: list[Load], num_new: int) -> None:
        self.name = name
        backend, *options = setting.split("+")
        num_tokens = max(sequences * context for sequences, context in loads)
        most = max(sequences for sequences, _ in loads)
        self._loop = asyncio.new_event_loop()
        self._engine = LocalEngine(
            LocalEngineConfig.model_validate(
                {
                    "model": str(model),
                    "device": device,
                    "enable_prefix_caching": False,
                    "attention_backend": backend,
                    "cuda_graphs": "graphs" in options,
                    "block_size": _BLOCK_SIZE.get(backend, 16),
                    "max_model_len": max(context for _, context in loads) + num_new,
                    "max_num_seqs": most,
                    "max_num_batched_tokens": max(8192, most),
                    # Room for what a sequence leaves unused of its last block, too.
                    "kv_cache_bytes": _kv_bytes(model, num_tokens + most * (num_new + 256)),
                    "drafter": {"kind": "none"},
                }
            )
        )
        self._loop.run_until_complete(self._engine.start())


class TransformersOnDevice(TransformersGenerate):
    """`generate` on `device`."""

    def __init__(self, model: Path, device: str) -> None:
        self._device = device
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._model: Any = loaded.to(device)

    def _generate(self, prompts: Prompts, num_new: int) -> float:
        ids = torch.tensor(prompts, device=self._device)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
            ).cpu()
        assert output.shape[1] == ids.shape[1] + num_new
        return time.perf_counter() - started


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by the fastest of ten large copies on the device."""
    kind = torch.device(device).type
    source = torch.empty(_COPIED_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        _synchronize(kind)
        started = time.perf_counter()
        target.copy_(source)
        _synchronize(kind)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def bytes_per_step(shape: str, sequences: int, context: float) -> float:
    """What a step of decoding has to read: all weights but the embeddings looked up, and the KV cache."""
    config = Qwen3Config.from_dict({"tie_word_embeddings": True, **SHAPES[shape]})
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    return 2 * weights + sequences * context * _kv_bytes_per_token(config)


def _kv_bytes(model: Path, num_tokens: int) -> int:
    return num_tokens * _kv_bytes_per_token(Qwen3Config.from_pretrained(model))


def _kv_bytes_per_token(config: Qwen3Config) -> int:
    assert config.num_key_value_heads is not None
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def with_bandwidth(row: dict[str, Any], shape: str, num_new: int, bandwidth: float) -> dict[str, Any]:
    """A row with the share of `bandwidth` (bytes per second) that its steps read at, halfway through decoding."""
    moved = bytes_per_step(shape, row["sequences"], row["context"] + num_new / 2)
    return row | {"share_of_bandwidth": round(moved / (row["step_ms"] / 1000) / bandwidth, 3)}


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "qwen3-0.6b",
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu")] = "cuda",
    sequences: Annotated[str, typer.Option(help="concurrent sequences, comma-separated")] = "1,16,64,256",
    context: Annotated[str, typer.Option(help="prompt tokens, comma-separated")] = "512",
    settings: Annotated[str, typer.Option(help="backend[+graphs], comma-separated; the first is the one compared")] = (
        "triton+graphs,triton,torch"
    ),
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="counted turns of each system")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Measure decode and prefill throughput on a device."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape} is not one of {', '.join(SHAPES)}")
    bandwidth = copy_bandwidth(device)
    with torch.device(device):
        model = materialize(shape, _CACHE)
    loads = [(int(count), int(length)) for length in context.split(",") for count in sequences.split(",")]
    systems: list[System] = [
        OutriderOnDevice(f"outrider_{setting}" if i else "outrider", model, device, setting, loads, new_tokens)
        for i, setting in enumerate(settings.split(","))
    ]
    systems.append(TransformersOnDevice(model, device))
    timings: Timings = {}
    for measured in measure(systems, loads, new_tokens, rounds, SHAPES[shape]["vocab_size"]):
        timings |= measured
    for system in systems:
        system.close()
    runs = [with_bandwidth(row, shape, new_tokens, bandwidth) for row in rows(timings, new_tokens)]
    _print_table(runs)
    if as_json:
        about = {"shape": shape, "device": device, "settings": settings, "copy_bytes_per_s": round(bandwidth)}
        print(json.dumps({"environment": describe() | about, "runs": runs, "ratios": ratios(timings)}))


def _print_table(runs: list[dict[str, Any]]) -> None:
    table = Table(*runs[0])
    for row in runs:
        table.add_row(*map(str, row.values()))
    _console.print(table)


if __name__ == "__main__":
    typer.run(main)
