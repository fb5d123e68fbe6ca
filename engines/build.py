"""Loading a LocalEngine: model, parity probe, capacity, tokenizer, step. Every failure is a one-line ModelLoadError."""

from __future__ import annotations

import hashlib
import logging
import time

import torch
import transformers

from engines.admission import Limits
from engines.attention import select_backend
from engines.capacity import plan_capacity
from engines.config import LocalEngineConfig
from engines.core import CoreSettings, EngineCore
from engines.errors import ModelLoadError
from engines.loading import LoadedModel, load_model, resolve_source
from engines.local import LoadedEngine
from engines.model_runner import ModelRunner
from engines.parity import probe
from engines.tokenizer import Tokenizer
from engines.types import ModelCard

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
    loaded = load_model(config)
    tokenizer = Tokenizer.load(resolve_source(config.model), config.revision)
    backend = select_backend(config.attention_backend, loaded.device)
    if config.parity_probe:
        probe(loaded, backend)
    capacity = plan_capacity(
        config,
        bytes_per_block=ModelRunner.bytes_per_block(loaded, config.block_size),
        max_position=loaded.max_position,
        activation_bytes=_activation_bytes(loaded, config),
        device=loaded.device,
    )
    limits = Limits(
        max_model_len=capacity.max_model_len,
        vocab_size=min(loaded.vocab_size, len(tokenizer)),
        num_blocks=capacity.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
    )
    settings = CoreSettings(
        model=f"{loaded.weights_fingerprint}:{loaded.dtype}",
        limits=limits,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        priority_step_s=config.priority_step_s,
        eos_token_ids=tokenizer.eos_token_ids,
        device=loaded.device,
    )
    runner = ModelRunner(loaded, backend, capacity.num_blocks, config.block_size)
    card = _card(config, loaded, backend.name, limits, capacity.kv_cache_bytes)
    _log.info("loaded %s in %.1f s: %s", config.model, time.perf_counter() - started, card.details)
    return LoadedEngine(EngineCore(settings, runner, tokenizer), limits, card)


def _activation_bytes(loaded: LoadedModel, config: LocalEngineConfig) -> int:
    """What the largest step needs beside weights and KV: activations of its tokens, float32 logits of its rows."""
    hidden = loaded.config.get_text_config().hidden_size
    logits = 3 * 4 * config.max_num_seqs * loaded.vocab_size
    return int(config.max_num_batched_tokens * hidden * _ACTIVATION_VECTORS * loaded.dtype.itemsize + logits)


def _card(
    config: LocalEngineConfig, loaded: LoadedModel, backend: str, limits: Limits, kv_cache_bytes: int
) -> ModelCard:
    details = {
        "architecture": loaded.architecture,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention_backend": backend,
        "weights": loaded.weights_fingerprint,
        "max_model_len": str(limits.max_model_len),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    # Replicas may differ in how many blocks their memory holds; that changes no answer.
    identity = repr((config.model_dump(mode="json"), sorted(details.items())))
    details |= {
        "kv_blocks": f"{limits.num_blocks} x {limits.block_size} tokens",
        "kv_cache_bytes": str(kv_cache_bytes),
    }
    return ModelCard(
        model=config.model,
        prompt_kinds=frozenset({"tokens"}),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        max_num_choices=limits.max_num_seqs,
        details=details,
    )
