"""optimize() keeps a model's logits, frees what it replaces, and leaves alone what it does not know."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from engines.attention.dispatch import AttentionCall, attending
from engines.native.library import isa_limited_to, library
from engines.optimized import Optimizations, optimize
from engines.optimized.linear import PackedLinear
from tests.engines.tiny_models import SUPPORTED, build

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
FUSED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "qwen3_moe", "mixtral"}
WHOLE = {"llama", "qwen2", "qwen3", "mistral"}
GATED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"}


def causal(call: AttentionCall) -> Tensor:
    """One sequence; no windows, caps or sinks, which optimizing does not touch."""
    query, key, value = (rows.transpose(0, 1).float() for rows in (call.query, call.key, call.value))
    output = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=call.scaling, enable_gqa=True
    )
    return output.transpose(0, 1).to(call.query.dtype)


def logits(model: PreTrainedModel, tokens: int = 17) -> Tensor:
    ids = torch.arange(3, 3 + tokens).unsqueeze(0)
    with torch.inference_mode(), attending(causal):
        output: Tensor = model(ids, use_cache=False).logits[0]
    return output


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_stay(name: str) -> None:
    model = build(SUPPORTED[name]())
    before = logits(model)
    done = optimize(model)
    assert done.norms > 0
    assert (done.attentions == 3) == (name in FUSED)
    assert (done.mlps == 3) == (name in GATED)
    assert (done.layers == 3) == (name in WHOLE)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_stay_within_rounding_in_bf16(name: str) -> None:
    """Not further from the fp32 model than transformers' own bf16, with room for luck."""
    exact = logits(build(SUPPORTED[name]()))
    model = build(SUPPORTED[name](), dtype=torch.bfloat16)
    before = logits(model).float()
    optimize(model)
    after = logits(model).float()
    assert (after - exact).norm() < 1.5 * (before - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_have_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Of everything that optimize puts in; attention to oneself takes the rest out of it."""

    def to_itself(call: AttentionCall) -> Tensor:
        return call.query + call.key.repeat_interleave(2, dim=1) + call.value.repeat_interleave(2, dim=1)

    model = build(SUPPORTED["qwen3"](), dtype=dtype)
    optimize(model)
    ids = torch.arange(3, 43).unsqueeze(0)
    positions = torch.arange(40).unsqueeze(0)
    with torch.inference_mode(), attending(to_itself):
        together = model(ids, position_ids=positions, use_cache=False).logits[0]
        for row in (0, 7, 39):
            one = slice(row, row + 1)
            alone = model(ids[:, one], position_ids=positions[:, one], use_cache=False).logits[0]
            assert torch.equal(alone[0], together[row])


def test_weights_are_replaced_not_doubled() -> None:
    config = SUPPORTED["qwen3"]()
    config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": False})
    model = build(config, dtype=torch.bfloat16)
    before = weight_bytes(model)
    originals = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    optimize(model)
    gc.collect()
    assert all(reference() is None for reference in originals)
    assert weight_bytes(model) < 1.02 * before


def test_an_embedding_keeps_a_weight_that_it_shares() -> None:
    config = SUPPORTED["qwen3"]()
    config.update({"tie_word_embeddings": True})
    model = build(config)
    embedding, before = model.get_input_embeddings().weight, logits(model)
    optimize(model)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert model.get_input_embeddings().weight is embedding
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_module_with_two_parents_stays() -> None:
    model = build(SUPPORTED["llama"]())
    layers = model.get_submodule("model.layers")
    shared = layers.get_submodule("0.mlp")
    layers.get_submodule("1").mlp = shared
    before = logits(model)
    assert optimize(model).mlps == 1
    assert layers.get_submodule("0.mlp") is layers.get_submodule("1.mlp") is shared
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_linear_whose_weight_its_owner_reads_stays() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.router.weight.dtype)

    model = build(SUPPORTED["llama"]())
    model.get_submodule("model.layers.0").mlp = Reader()
    optimize(model)
    assert type(model.get_submodule("model.layers.0.mlp.router")) is nn.Linear


def test_optimizing_twice_changes_nothing() -> None:
    model = build(SUPPORTED["qwen3"]())
    assert not optimize(model).leaves_matrices
    before = logits(model)
    assert optimize(model) == Optimizations(leaves_matrices=False)
    assert torch.equal(logits(model), before)


def test_training_models_and_slow_instruction_sets_are_left_alone() -> None:
    model = build(SUPPORTED["llama"]())
    with isa_limited_to("portable"):
        assert optimize(model) == Optimizations()
    assert optimize(model.train()) == Optimizations()
    assert type(model.get_output_embeddings()) is nn.Linear


def test_kinds_can_be_left_out() -> None:
    model = build(SUPPORTED["llama"]())
    assert optimize(model, ("norms", "mlps")) == Optimizations(mlps=3, norms=7)
    assert optimize(model, ("attentions",)) == Optimizations(attentions=3)
    assert optimize(model, ("layers",)) == Optimizations(layers=3)


def test_the_summary_counts() -> None:
    summary = optimize(build(SUPPORTED["llama"]())).summary()
    assert summary == (
        "3 attention blocks and 3 MLPs fused, 7 norms and 1 linears replaced by native kernels, "
        "3 layers in one call each"
    )
