"""llama.cpp through its C API, one batch of tokens at a time: what the peers of the benchmarks are made of.

Import torch first: then both use torch's OpenMP threads, and two pools do not spin against each other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[np.integer[Any]]  # a number for each token of a batch
Wanted = bool | NDArray[np.bool_]  # whether its logits are, likewise

_CELLS = 256  # llama.cpp rounds a sequence's share of its cache up to this many tokens


@dataclass(frozen=True, slots=True)
class Options:
    """What a context can be tuned by; `benchmarks/README.md` has what the defaults were compared with."""

    flash_attention: bool = True
    cache_type: int = llama_cpp.GGML_TYPE_F16
    ubatch_tokens: int = 512
    is_unified: bool = False


class Model:
    """The weights of a GGUF file, on the CPU."""

    def __init__(self, path: Path, load_mode: int = llama_cpp.LLAMA_LOAD_MODE_NONE) -> None:
        """Raises OSError if llama.cpp cannot load the file."""
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = load_mode
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise OSError(f"llama.cpp cannot load {path}")
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.handle))

    def close(self) -> None:
        llama_cpp.llama_model_free(self.handle)


class Context:
    """A KV cache of `num_sequences`, each with room for `num_tokens`, and the buffers of a batch."""

    def __init__(
        self, model: Model, num_sequences: int, num_tokens: int, num_threads: int, options: Options = Options()
    ) -> None:
        """Raises MemoryError if llama.cpp cannot make the context."""
        self.num_sequences = num_sequences
        self.num_tokens = -(-num_tokens // _CELLS) * _CELLS
        capacity = num_sequences * self.num_tokens
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = capacity
        params.n_ubatch = min(options.ubatch_tokens, capacity)
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = int(options.flash_attention)
        params.type_k = params.type_v = options.cache_type
        params.kv_unified = options.is_unified
        params.no_perf = True
        self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise MemoryError(f"llama.cpp made no context for {num_sequences} sequences of {num_tokens} tokens")
        self._memory = llama_cpp.llama_get_memory(self.handle)
        self._vocab_size = model.vocab_size
        self._batch = _Batch(capacity)

    def decode(
        self,
        token_ids: Tokens,
        positions: Tokens,
        sequences: int | Tokens = 0,
        wanted: Wanted = True,
    ) -> NDArray[np.float32]:
        """Logits, float32 [num_wanted, vocab], of the tokens that are `wanted`, in order; valid until the next call.

        Raises RuntimeError where llama.cpp reports a failure, such as a full cache.
        """
        num_wanted = self._batch.fill(token_ids, positions, sequences, wanted)
        if code := llama_cpp.llama_decode(self.handle, self._batch.struct):
            raise RuntimeError(f"llama_decode of {len(token_ids)} tokens failed with {code}")
        logits = llama_cpp.llama_get_logits(self.handle)  # waits until they are there
        return np.ctypeslib.as_array(logits, shape=(num_wanted, self._vocab_size))

    def forget(self, sequence: int = 0, start: int = 0) -> None:
        """Drop a sequence's tokens from position `start` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        llama_cpp.llama_free(self.handle)


class _Batch:
    """A llama_batch over arrays of ours, so that filling it costs the same for one token and for thousands."""

    def __init__(self, capacity: int) -> None:
        self._token_ids, self._positions, self._sequences = (np.zeros(capacity, np.int32) for _ in range(3))
        self._num_sequences = np.ones(capacity, np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        # seq_id is an array of pointers: each token's to its own place in the array of sequences
        places = self._sequences.ctypes.data + np.arange(capacity, dtype=np.uint64) * self._sequences.itemsize
        self._places = places.astype(np.uintp)
        int32, int8 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        self.struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._token_ids.ctypes.data_as(int32),
            embd=None,
            pos=self._positions.ctypes.data_as(int32),
            n_seq_id=self._num_sequences.ctypes.data_as(int32),
            seq_id=self._places.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._wanted.ctypes.data_as(int8),
        )

    def fill(
        self, token_ids: Tokens, positions: Tokens, sequences: int | Tokens, wanted: bool | NDArray[np.bool_]
    ) -> int:
        """Set the batch; the number of wanted logits."""
        count = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wanted[:count] = wanted
        self.struct.n_tokens = count
        return int(np.count_nonzero(self._wanted[:count]))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp reports failures by its return values as well."""
