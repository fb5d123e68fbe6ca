"""A layer in one call gives the bits of its parts, and runs as its parts wherever it has to."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from engines.attention.dispatch import AttentionCall, attending
from engines.attention.native import NativeAttention
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.causal_lm import row_logits
from engines.native.library import library
from engines.optimized import optimize
from engines.optimized.decoder_layer import Caches, FusedDecoderLayer, stepping
from engines.quant.model import quantize
from engines.quant.scheme import Scheme
from tests.engines.tiny_models import SUPPORTED, VOCAB_SIZE, build

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
BLOCK_SIZE = 16
NUM_BLOCKS = 12
WHOLE = ("llama", "qwen2", "qwen3", "mistral", "gemma")
_KV_HEADS = 2


def _gemma() -> PretrainedConfig:
    return transformers.GemmaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=_KV_HEADS,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = SUPPORTED | {"gemma": _gemma}


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())


def optimized(name: str, dtype: torch.dtype, scheme: Scheme | None = None) -> PreTrainedModel:
    model = build(CONFIGS[name](), dtype=dtype)
    if scheme is not None:
        quantize(model, scheme, group_size=16)
    optimize(model)
    return model


def caches_of(model: PreTrainedModel, dtype: torch.dtype) -> Caches:
    head_dim = model.config.head_dim if hasattr(model.config, "head_dim") else 8
    extra = 4 if dtype is torch.int8 else 0
    shape = (NUM_BLOCKS, BLOCK_SIZE, model.config.num_key_value_heads, head_dim + extra)
    return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in layers_of(model)]


def batch_of(*stretches: tuple[int, int]) -> RaggedBatch:
    """Sequences with these first and last positions in the step, each on three blocks of its own."""
    token_ids = array("i", [3 + (7 * i) % (VOCAB_SIZE - 3) for i in range(64)])
    items = [
        BatchItem(token_ids, start, stop, (), array("i", range(3 * row, 3 * row + 3)), num_logit_rows=stop - start)
        for row, (start, stop) in enumerate(stretches)
    ]
    return build_batch(items, BLOCK_SIZE, torch.device("cpu"))


def attend(batch: RaggedBatch, caches: Caches, call: AttentionCall) -> Tensor:
    options = {name: getattr(call, name) for name in ("scaling", "sliding_window", "softcap", "sinks")}
    return NativeAttention().attend(call.query, call.key, call.value, *caches[call.layer_idx], batch, **options)


def logits(model: PreTrainedModel, batch: RaggedBatch, caches: Caches, *, whole: bool) -> Tensor:
    running = stepping(batch, caches) if whole else attending(partial(attend, batch, caches))
    with running:
        return row_logits(model, batch.input_ids, batch.positions, batch.logit_rows, selects_rows=True)


STEPS = (batch_of((0, 37), (0, 1), (0, 5)), batch_of((37, 38), (1, 2), (5, 11), (0, 3)), batch_of((38, 39)))


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=("kv", "int8 kv"))
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_layer_has_the_bits_of_its_parts(
    name: str, dtype: torch.dtype, scheme: Scheme | None, kv_dtype: torch.dtype | None
) -> None:
    model = optimized(name, dtype, scheme)
    assert all(isinstance(layer, FusedDecoderLayer) for layer in layers_of(model))
    caches = [caches_of(model, kv_dtype or dtype) for _ in range(2)]
    for batch in STEPS:
        assert torch.equal(logits(model, batch, caches[0], whole=True), logits(model, batch, caches[1], whole=False))
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_its_input_stays_as_it_is() -> None:
    model = optimized("llama", torch.bfloat16)
    layer, caches, batch = layers_of(model)[0], caches_of(model, torch.bfloat16), STEPS[0]
    hidden = torch.randn(1, 43, 32).to(torch.bfloat16)
    before = hidden.clone()
    tables = torch.randn(2, 1, 43, 8).to(torch.bfloat16).unbind()
    with torch.inference_mode(), stepping(batch, caches):
        output = layer(hidden, position_embeddings=tables)
    assert torch.equal(hidden, before)
    assert output.shape == hidden.shape
    assert not torch.equal(output, hidden)


class Parts(nn.Module):
    """Stands for a layer's parts: notes that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, object]] = []
        self.attention_type = "full_attention"

    def forward(self, hidden: Tensor, **arguments: object) -> Tensor:
        self.asked.append(arguments)
        return hidden


@pytest.mark.parametrize(
    "asked",
    [
        {"attention_mask": torch.zeros(1, 1, 43, 43)},
        {"past_key_values": object()},
        {"something_new": True},
        {"position_embeddings": torch.randn(2, 1, 43, 8).double().unbind()},
        {"position_embeddings": None},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_the_call_does_not_do_goes_to_the_parts(asked: dict[str, object]) -> None:
    model = optimized("llama", torch.float32)
    layer, parts = layers_of(model)[0], Parts()
    layer.layer = parts
    hidden, tables = torch.randn(1, 43, 32), torch.randn(2, 1, 43, 8).unbind()
    with torch.inference_mode(), stepping(STEPS[0], caches_of(model, torch.float32)):
        layer(hidden, position_embeddings=tables)
        assert not parts.asked
        layer(hidden, **({"position_embeddings": tables} | asked))
    assert [arguments[name] is value for name, value in asked.items() for arguments in parts.asked] == [True]


def test_without_a_step_the_parts_serve() -> None:
    model = optimized("llama", torch.float32)
    layer, parts = layers_of(model)[0], Parts()
    layer.layer = parts
    layer(torch.randn(1, 3, 32), position_embeddings=torch.randn(2, 1, 3, 8).unbind())
    assert len(parts.asked) == 1


def test_what_models_read_of_their_layers_is_there() -> None:
    layer = layers_of(optimized("llama", torch.float32))[0]
    layer.layer = Parts()
    assert layer.attention_type == "full_attention"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "qwen3_moe", "mixtral"])
def test_layers_of_other_parts_stay(name: str) -> None:
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers_of(optimized(name, torch.float32)))


def test_a_layer_that_computes_something_else_from_the_same_parts_stays() -> None:
    config = transformers.GraniteConfig(
        **{name: value for name, value in _gemma().to_dict().items() if name not in ("model_type", "head_dim")},
        residual_multiplier=0.5,
    )
    model = build(config)
    done = optimize(model)
    assert done.attentions == done.mlps == 2
    assert done.layers == 0
