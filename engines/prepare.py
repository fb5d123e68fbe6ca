"""A model as it is served: loaded, made faster, and shown to say the same as before."""

from __future__ import annotations

import logging
from dataclasses import replace

from engines.attention import AttentionBackend, resolve_kv_dtype
from engines.config import LocalEngineConfig
from engines.loading import LoadedModel, load_model, weight_bytes
from engines.optimized import optimize
from engines.parity import compare, expect

_log = logging.getLogger(__name__)


def prepare_model(config: LocalEngineConfig, backend: AttentionBackend) -> LoadedModel:
    """Load `config.model` and exchange what native kernels do faster.

    The parity probe, unless it is off, compares what the engine then computes with the model's eager output before;
    with an int8 KV cache once more, which is held to a bound of its own.
    Raises ModelLoadError and its subclasses.
    """
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, backend)
    loaded = load_model(config)
    expected = expect(loaded) if config.parity_probe else None
    if config.optimize:
        done = optimize(loaded.model)
        on_kernels = not done.leaves_matrices and backend.name == "native"
        loaded = replace(loaded, weight_bytes=weight_bytes(loaded.model), runs_on_kernels=on_kernels)
        _log.info("%s: %s", config.model, done.summary())
    if expected is not None:
        compare(loaded, backend, expected)
        if kv_dtype is not None:
            compare(loaded, backend, expected, kv_dtype)
    return loaded
