"""Loading a LocalEngine: model, parity probe, capacity, tokenizer, step. Every failure is a one-line ModelLoadError."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from pathlib import Path

import torch
import transformers

from engines.admission import Limits
from engines.attention import AttentionBackend, resolve_kv_dtype, select_backend
from engines.capacity import Capacity, plan_capacity
from engines.config import LocalEngineConfig, NoDrafterConfig
from engines.core import CoreSettings, EngineCore
from engines.costs_file import costs_path, load_costs, save_costs
from engines.cuda_graphs import GraphRunner, graph_runner
from engines.drafters import load_draft_model, make_speculation
from engines.errors import ModelLoadError
from engines.loading import LoadedModel, resolve_device, resolve_source
from engines.local import LoadedEngine
from engines.model_runner import ModelRunner
from engines.prepare import prepare_model
from engines.quant.model import describe
from engines.tokenizer import Tokenizer
from engines.types import ModelCard, PrefixBlocks

_log = logging.getLogger(__name__)

_ACTIVATION_VECTORS = 24  # hidden-sized activations alive at once per token, generously


def load_engine(config: LocalEngineConfig) -> LoadedEngine:
    """Load and check everything that serving `config` needs. Raises ModelLoadError and its subclasses."""
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ModelLoadError(
            f"max_num_batched_tokens ({config.max_num_batched_tokens}) is below max_num_seqs ({config.max_num_seqs}): "
            "a step could not give every sequence its token."
        )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    started = time.perf_counter()
    backend = select_backend(config.attention_backend, resolve_device(config.device))
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, backend)
    loaded = prepare_model(config, backend)
    tokenizer = Tokenizer.load(resolve_source(config.model), config.revision)
    vocab_size = min(loaded.vocab_size, len(tokenizer))
    draft = load_draft_model(config, tokenizer, vocab_size, backend)
    capacity = plan_capacity(
        config,
        # One block id means a block of each model's memory.
        bytes_per_block=sum(
            ModelRunner.bytes_per_block(model, config.block_size, kv_dtype) for model in (loaded, draft) if model
        ),
        max_position=loaded.max_position,
        activation_bytes=_activation_bytes(loaded, config),
        device=loaded.device,
    )
    draft_runner = _runner(draft, backend, config, capacity) if draft else None
    key = _costs_key(config, loaded, draft, backend.name)
    path = costs_path(config.costs_file, key)
    kept = load_costs(path, key) if path else None
    speculation = make_speculation(config.drafter, draft, draft_runner, vocab_size, loaded.device, kept)
    limits = Limits(
        max_model_len=capacity.max_model_len,
        vocab_size=vocab_size,
        num_blocks=capacity.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        drafters=frozenset(speculation.speculator.sources),
    )
    settings = _settings(config, loaded, limits, tokenizer, f"{loaded.weights_fingerprint}:{loaded.dtype}:{kv_dtype}")
    runner = _runner(loaded, backend, config, capacity)
    card = _card(config, loaded, draft, backend.name, limits, capacity.kv_cache_bytes, settings.model)
    _log.info("loaded %s in %.1f s: %s", config.model, time.perf_counter() - started, card.details)
    core = EngineCore(settings, runner, tokenizer, speculation)

    level = logging.WARNING

    def keep() -> None:
        nonlocal level
        if path and speculation.max_draft_tokens:
            is_kept = save_costs(path, key, speculation.speculator.state(), level)
            # Where nothing can be written, that is said once and not every minute.
            level = logging.WARNING if is_kept else logging.DEBUG

    return LoadedEngine(core, speculation.speculator, limits, card, keep, watch=core.watch_blocks)


def _settings(
    config: LocalEngineConfig, loaded: LoadedModel, limits: Limits, tokenizer: Tokenizer, model: str
) -> CoreSettings:
    return CoreSettings(
        model=model,
        limits=limits,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        priority_step_s=config.priority_step_s,
        eos_token_ids=tokenizer.eos_token_ids,
        device=loaded.device,
    )


def _runner(
    loaded: LoadedModel, backend: AttentionBackend, config: LocalEngineConfig, capacity: Capacity
) -> ModelRunner | GraphRunner:
    if config.cuda_graphs:
        return graph_runner(
            loaded,
            backend,
            num_blocks=capacity.num_blocks,
            block_size=config.block_size,
            max_model_len=capacity.max_model_len,
        )
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, backend)
    return ModelRunner(loaded, backend, capacity.num_blocks, config.block_size, kv_dtype)


def _activation_bytes(loaded: LoadedModel, config: LocalEngineConfig) -> int:
    """What the largest step needs beside weights and KV: activations of its tokens, float32 logits of its rows."""
    hidden = loaded.config.get_text_config().hidden_size
    rows_per_seq = 1 if isinstance(config.drafter, NoDrafterConfig) else 1 + config.drafter.max_draft_tokens
    logits = 3 * 4 * min(config.max_num_seqs * rows_per_seq, config.max_num_batched_tokens) * loaded.vocab_size
    return int(config.max_num_batched_tokens * hidden * _ACTIVATION_VECTORS * loaded.dtype.itemsize + logits)


def _costs_key(config: LocalEngineConfig, loaded: LoadedModel, draft: LoadedModel | None, backend: str) -> str:
    """Stands for whatever the speed of a step and the drafters' luck depend on."""
    device = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else _processor()
    parts = (
        loaded.weights_fingerprint,
        loaded.dtype,
        describe(loaded.model),
        draft.weights_fingerprint if draft else None,
        backend,
        config.kv_cache_dtype,
        device,
        torch.get_num_threads(),
        config.optimize,
        config.cuda_graphs,
        config.block_size,
        torch.__version__,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _card(
    config: LocalEngineConfig,
    loaded: LoadedModel,
    draft: LoadedModel | None,
    backend: str,
    limits: Limits,
    kv_cache_bytes: int,
    content: str,
) -> ModelCard:
    details = {
        "architecture": loaded.architecture,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantization": describe(loaded.model),
        "attention_backend": backend,
        "kv_cache_dtype": config.kv_cache_dtype,
        "weights": loaded.weights_fingerprint,
        "max_model_len": str(limits.max_model_len),
        "drafters": ", ".join(sorted(limits.drafters)) or "none",
        "draft_weights": draft.weights_fingerprint if draft else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    # Replicas may differ in how many blocks their memory holds; that changes no answer.
    identity = repr((config.model_dump(mode="json"), sorted(details.items())))
    details |= {
        "kv_blocks": f"{limits.num_blocks} x {limits.block_size} tokens",
        "kv_cache_bytes": str(kv_cache_bytes),
        "weight_bytes": str(loaded.weight_bytes),
    }
    return ModelCard(
        model=config.model,
        prompt_kinds=frozenset({"tokens"}),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        max_num_choices=limits.max_num_seqs,
        details=details,
        prefix_blocks=PrefixBlocks(content, config.block_size) if config.enable_prefix_caching else None,
    )


def _processor() -> str:
    """The CPU's model, where Linux tells it, and what its vector units can do."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    model = next((line for line in lines if line.startswith("model name")), platform.machine())
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"
