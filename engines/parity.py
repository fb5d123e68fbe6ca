"""Decides by evidence whether an architecture can be served: its paged output against its own eager output, at load.

Registering an attention function proves little: some architectures hide windows in masks, drop arguments, or keep state
outside of attention, and are right on one uninterrupted prefill. So the probe does what serving does: chunks, single
decodes and verification with rejected drafts, mixed in ragged batches, on shuffled blocks of a cache filled with NaN.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engines.attention.dispatch import ATTENTION_NAME
from engines.attention.interface import AttentionBackend
from engines.batch import BatchItem, build_batch
from engines.errors import UnsupportedModelError
from engines.loading import LoadedModel
from engines.model_runner import ModelRunner

_BLOCK_SIZE = 4
_TAIL_TOKENS = 12  # rows of the long sequence after its first chunk, all of them beyond the sliding window
_SHORT_TOKENS = 12
_MIN_LONG_TOKENS = 20
_MAX_PROBED_WINDOW = 256
_BIG_MODEL_BYTES = 4 << 30
_MAX_PROBED_WINDOW_BIG = 32
_NOISE_FACTOR = 3.0
# Relative error of a row of logits: what is always allowed, and what the model's own rounding may stretch that to.
_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (5e-3, 5e-2), torch.bfloat16: (2e-2, 1e-1)}
# With an int8 KV cache: its rounding makes some 1 % in random tiny models, more where it sends a row to other experts.
_INT8_KV_TOLERANCE = 0.25

# Steps of (sequence 0, sequence 1): known tokens, and wrong drafts behind them, which are rejected and overwritten.
# Sequence 0 begins with a chunk as long as its window.
_TAIL_STEPS: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = (
    ((4, 0), (1, 0)),
    ((1, 0), (2, 2)),
    ((2, 2), (1, 0)),
    ((1, 0), (1, 0)),
    ((2, 1), (3, 0)),
    ((2, 0), (0, 0)),
)
_FIRST_SHORT_CHUNK = 4


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What was compared. Errors are relative (L2 norm of a row's difference over the row's), worst by kind of step.

    `noise` is the model's own: how far its eager output moves if its embeddings are rounded once more.
    """

    architecture: str
    backend: str
    errors: dict[str, float]
    noise: float
    tolerance: float
    num_tokens: int
    probed_windows: tuple[int, ...]
    unprobed_windows: tuple[int, ...]
    seconds: float

    def summary(self) -> str:
        """One line for the log."""
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in self.errors.items())
        skipped = f"; windows too long to probe: {self.unprobed_windows}" if self.unprobed_windows else ""
        return f"{self.architecture}: paged equals eager within {self.tolerance:.1e} ({errors}{skipped})"


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    expected: Tensor
    table: array[int]
    num_computed: int = 0
    errors: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a model says by itself, eagerly: to be kept from before it is changed to run faster.

    `logits` [num_tokens, vocab], fp32, for each of `token_ids`; `noise` and `tolerance` as in ParityReport.
    """

    token_ids: list[list[int]]
    logits: list[Tensor]
    noise: float
    tolerance: float
    probed_windows: tuple[int, ...]
    unprobed_windows: tuple[int, ...]


def probe(loaded: LoadedModel, backend: AttentionBackend) -> ParityReport:
    """Compare a model with itself: `compare(loaded, backend, expect(loaded))`."""
    return compare(loaded, backend, expect(loaded))


def expect(loaded: LoadedModel) -> Expectation:
    """The model's own output; its attention implementation is switched to eager meanwhile and restored after.

    Not to be called while another thread uses the model. Raises UnsupportedModelError for a model that is not causal
    or cannot be probed.
    """
    probed, unprobed = _windows(loaded)
    token_ids = _token_ids(loaded, max((*probed, _MIN_LONG_TOKENS - _TAIL_TOKENS)) + _TAIL_TOKENS)
    with torch.inference_mode(), _eager(loaded.model):
        logits = [_eager_logits(loaded, ids) for ids in token_ids]
        _check_causal(loaded, token_ids[0], logits[0])
        noise = _noise(loaded, token_ids[0], logits[0])
    return Expectation(token_ids, logits, noise, _tolerance(loaded, noise), probed, unprobed)


def compare(
    loaded: LoadedModel, backend: AttentionBackend, expected: Expectation, kv_dtype: torch.dtype | None = None
) -> ParityReport:
    """Serve the probe's sequences from a cache of `kv_dtype` (None: the model's) and compare.

    Raises UnsupportedModelError naming the architecture, the step that differs and by how much.
    """
    started = time.perf_counter()
    with torch.inference_mode():
        sequences = _run(loaded, backend, expected, kv_dtype)
    report = ParityReport(
        architecture=loaded.architecture,
        backend=backend.name,
        errors=_worst(sequences, kv_dtype or loaded.dtype),
        noise=expected.noise,
        tolerance=expected.tolerance if kv_dtype is None else max(expected.tolerance, _INT8_KV_TOLERANCE),
        num_tokens=sum(map(len, expected.token_ids)),
        probed_windows=expected.probed_windows,
        unprobed_windows=expected.unprobed_windows,
        seconds=time.perf_counter() - started,
    )
    _judge(report)
    return report


def _windows(loaded: LoadedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The model's sliding windows: those the probe goes beyond, and those too long for that."""
    longest = _MAX_PROBED_WINDOW if loaded.weight_bytes < _BIG_MODEL_BYTES else _MAX_PROBED_WINDOW_BIG
    windows = sorted({window for window in loaded.sliding_windows if window is not None})
    reach = min(longest, (loaded.max_position or longest + _TAIL_TOKENS) - _TAIL_TOKENS)
    unprobed = tuple(window for window in windows if window > reach)
    declared = getattr(loaded.config.get_text_config(), "sliding_window", None)
    for window in unprobed:
        if window != declared:
            raise UnsupportedModelError(
                f"{loaded.architecture} attends with a window of {window} tokens, but its config says {declared}."
            )
    return tuple(window for window in windows if window <= reach), unprobed


def _token_ids(loaded: LoadedModel, long_tokens: int) -> list[list[int]]:
    """Two token sequences, seeded, without the tokens that the config gives a special meaning."""
    if loaded.max_position is not None and loaded.max_position < long_tokens:
        raise UnsupportedModelError(
            f"{loaded.architecture} takes {loaded.max_position} tokens; fewer than {long_tokens} cannot be probed."
        )
    special = {value for name, value in vars(loaded.config).items() if name.endswith("token_id")}
    allowed = torch.tensor([token for token in range(min(loaded.vocab_size, 4096)) if token not in special])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(allowed), (long_tokens + _SHORT_TOKENS,), generator=generator)
    tokens: list[int] = allowed[picks].tolist()
    return [tokens[:long_tokens], tokens[long_tokens:]]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _eager_logits(loaded: LoadedModel, token_ids: list[int]) -> Tensor:
    """Logits [num_tokens, vocab], fp32, of one uninterrupted forward."""
    logits = loaded.model(torch.tensor([token_ids], device=loaded.device), use_cache=False).logits
    fp32: Tensor = logits[0].float()
    return fp32


def _check_causal(loaded: LoadedModel, token_ids: list[int], expected: Tensor) -> None:
    prefix = token_ids[: len(token_ids) - _TAIL_TOKENS // 2]
    error = _typical(_row_errors(_eager_logits(loaded, prefix), expected[: len(prefix)]), loaded.dtype)
    if not error <= _TOLERANCES[loaded.dtype][1]:
        raise UnsupportedModelError(
            f"{loaded.architecture} is not causal: its own output for a prefix changes by {error:.2g} (relative) with "
            "the tokens that follow; the engine cannot serve it."
        )


def _noise(loaded: LoadedModel, token_ids: list[int], expected: Tensor) -> float:
    """How far the model's own output moves if each embedded number is rounded once more, at random up or down."""

    def jitter(module: nn.Module, args: object, embedded: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        signs = torch.randint(2, embedded.shape, generator=generator).mul(2).sub(1).to(embedded.device)
        step = torch.finfo(loaded.dtype).eps
        return (embedded.double() * (1 + step * signs)).to(embedded.dtype)

    handle = loaded.model.get_input_embeddings().register_forward_hook(jitter)
    try:
        return _typical(_row_errors(_eager_logits(loaded, token_ids), expected), loaded.dtype)
    finally:
        handle.remove()


def _tolerance(loaded: LoadedModel, noise: float) -> float:
    least, most = _TOLERANCES[loaded.dtype]
    return min(max(least, noise * _NOISE_FACTOR), most)


def _row_errors(logits: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each row [num_rows]."""
    difference = torch.linalg.vector_norm(logits.float() - expected, dim=1)
    relative: Tensor = difference / torch.linalg.vector_norm(expected, dim=1).clamp(min=1e-30)
    return relative


def _run(
    loaded: LoadedModel, backend: AttentionBackend, expected: Expectation, kv_dtype: torch.dtype | None
) -> list[_Sequence]:
    """Serve the sequences step by step, on shuffled blocks of a cache full of NaN."""
    token_ids = expected.token_ids
    block_size = -(-_BLOCK_SIZE // backend.block_multiple) * backend.block_multiple
    blocks_each = -(-max(map(len, token_ids)) // block_size) + 1  # rejected drafts may need one more
    runner = ModelRunner(loaded, backend, 2 * blocks_each, block_size, kv_dtype)
    for cache in runner.kv_tensors:
        cache.fill_(-1 if cache.dtype is torch.int8 else torch.nan)  # the bits of -1 make a scale of NaN
    shuffled = torch.randperm(2 * blocks_each, generator=torch.Generator().manual_seed(1)).tolist()
    tables = (array("i", shuffled[:blocks_each]), array("i", shuffled[blocks_each:]))
    sequences = [_Sequence(*parts) for parts in zip(token_ids, expected.logits, tables, strict=True)]
    first = ((len(token_ids[0]) - _TAIL_TOKENS, 0), (_FIRST_SHORT_CHUNK, 0))
    for step in (first, *_TAIL_STEPS):
        _run_step(runner, sequences, step, loaded.device)
    assert all(sequence.num_computed == len(sequence.token_ids) for sequence in sequences)
    return sequences


def _run_step(
    runner: ModelRunner,
    sequences: list[_Sequence],
    step: tuple[tuple[int, int], tuple[int, int]],
    device: torch.device,
) -> None:
    """One ragged forward; compares the rows of known tokens and forgets the drafts."""
    work = [(sequence, *counts) for sequence, counts in zip(sequences, step, strict=True) if counts[0]]
    items = [_item(sequence, num_known, num_drafts) for sequence, num_known, num_drafts in work]
    logits = runner.forward(build_batch(items, runner.block_size, device))
    parts = torch.split(logits, [item.num_logit_rows for item in items])
    for (sequence, num_known, num_drafts), rows in zip(work, parts, strict=True):
        start, stop = sequence.num_computed, sequence.num_computed + num_known
        errors = _row_errors(rows[:num_known], sequence.expected[start:stop]).tolist()
        sequence.errors.setdefault(_kind(start, num_known, num_drafts), []).extend(errors)
        sequence.num_computed = stop


def _item(sequence: _Sequence, num_known: int, num_drafts: int) -> BatchItem:
    start, stop = sequence.num_computed, sequence.num_computed + num_known
    wrong = tuple(sequence.token_ids[:num_drafts])
    return BatchItem(sequence.token_ids, start, stop, wrong, sequence.table, num_known + num_drafts)


def _kind(start: int, num_known: int, num_drafts: int) -> str:
    if num_drafts:
        return "verify"
    if num_known == 1:
        return "decode"
    return "chunk" if start else "prefill"


def _worst(sequences: list[_Sequence], dtype: torch.dtype) -> dict[str, float]:
    """Worst error by kind of step over the sequences; below fp32 their median rows stand for them.

    In a mixture of experts, rounding alone may send a single row to another expert; what the engine gets wrong is
    wrong in every row of its kind.
    """
    worst: dict[str, float] = {}
    for sequence in sequences:
        for kind, errors in sequence.errors.items():
            worst[kind] = max(worst.get(kind, 0.0), _typical(torch.tensor(errors), dtype))
    return worst


def _typical(errors: Tensor, dtype: torch.dtype) -> float:
    """One number for a set of rows: the worst; below fp32 the median. NaN is infinitely wrong."""
    errors = torch.nan_to_num(errors, nan=torch.inf)
    return errors.max().item() if dtype == torch.float32 else errors.median().item()


def _judge(report: ParityReport) -> None:
    kind, error = max(report.errors.items(), key=lambda item: item[1])
    if error > report.tolerance:
        raise UnsupportedModelError(
            f"{report.architecture} cannot be served: its paged output differs from its own eager output in a "
            f"{kind} step, by {error:.2g} (relative; {report.tolerance:.2g} is allowed)."
        )
