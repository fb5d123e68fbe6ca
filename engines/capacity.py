"""How much KV cache a memory budget buys, and how long a sequence may be."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from engines.config import LocalEngineConfig
from engines.errors import MemoryBudgetError, ModelLoadError

_DEFAULT_CPU_KV_BYTES = 1 << 30
_MIB = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Resolved sizes: blocks, tokens, bytes."""

    num_blocks: int
    max_model_len: int
    kv_cache_bytes: int


def plan_capacity(
    config: LocalEngineConfig,
    *,
    bytes_per_block: int,
    max_position: int | None,
    activation_bytes: int,
    device: torch.device,
) -> Capacity:
    """Sizes for a model whose weights are already on `device`.

    `max_position` is the model's own limit in tokens, None where it has none; `activation_bytes` is what the largest
    step needs beside weights and KV. Raises ModelLoadError if `max_model_len` is beyond the model, MemoryBudgetError if
    the budget does not hold one sequence of `max_model_len`.
    """
    if config.max_model_len and max_position and config.max_model_len > max_position:
        raise ModelLoadError(f"max_model_len is {config.max_model_len}, but the model ends at {max_position} tokens.")
    budget = _kv_budget(config, activation_bytes, device)
    num_blocks = budget // bytes_per_block
    held = num_blocks * config.block_size
    wanted = config.max_model_len or min(max_position or held, held)
    if num_blocks < 1 or held < wanted:
        needed = -(-max(wanted, 1) // config.block_size) * bytes_per_block
        raise MemoryBudgetError(
            f"The KV cache may take {budget / _MIB:,.2f} MiB ({held} tokens), but one sequence of {max(wanted, 1)} "
            f"tokens takes {needed / _MIB:,.2f} MiB. Raise kv_cache_bytes or memory_fraction, or lower max_model_len."
        )
    if config.max_model_len is None and max_position is not None and wanted < max_position:
        _log.warning("the KV cache holds %d tokens, so max_model_len is that instead of %d", wanted, max_position)
    return Capacity(num_blocks, wanted, num_blocks * bytes_per_block)


def _kv_budget(config: LocalEngineConfig, activation_bytes: int, device: torch.device) -> int:
    """Bytes for KV; never more than what is free now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = int(total * config.memory_fraction) - (total - free) - activation_bytes
        budget = share if config.kv_cache_bytes is None else config.kv_cache_bytes
        free -= activation_bytes
    else:
        free = _free_host_bytes()
        budget = min(_DEFAULT_CPU_KV_BYTES, free // 2) if config.kv_cache_bytes is None else config.kv_cache_bytes
    if budget > free:
        raise MemoryBudgetError(
            f"The KV cache is to take {budget / _MIB:,.2f} MiB, but {device} has {max(free, 0) / _MIB:,.2f} MiB free."
        )
    return max(budget, 0)


def _free_host_bytes() -> int:
    """Memory that can be taken without swapping, in bytes."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
