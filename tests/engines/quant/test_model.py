from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from engines.attention import select_backend
from engines.loading import inspect_model
from engines.parity import probe
from engines.quant.linear import QuantizedLinear
from engines.quant.memory import layer_bytes, planned_bytes
from engines.quant.model import describe, output_layer, quantizable, quantize, quantized_layers
from engines.quant.scheme import Scheme
from tests.engines import tiny_models


def test_every_linear_layer_is_replaced_and_the_head_is_int8() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["llama"]())
    seen: list[tuple[int, int]] = []
    count = quantize(model, "int4", group_size=16, progress=lambda done, total: seen.append((done, total)))
    layers = quantized_layers(model)
    assert count == len(layers) == 3 * 7 + 1
    assert seen == [(index + 1, count) for index in range(count)]
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert {name: layer.bits for name, layer in layers.items() if layer.bits == 8} == {"lm_head": 8}
    assert describe(model) == "int4 in groups of 16, int8"
    assert not any(tensor.requires_grad for tensor in model.buffers())


def test_a_tied_embedding_stays() -> None:
    config = tiny_models.SUPPORTED["llama"]()
    config.tie_word_embeddings = True
    model = tiny_models.build(config, dtype=torch.bfloat16)
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    quantize(model, "int8")
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    head = quantized_layers(model)["lm_head"]
    assert (head.dequantized() - before.float()).abs().max() < before.abs().max() / 100


def test_the_head_can_be_kept() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["llama"]())
    head = model.get_output_embeddings()
    assert output_layer(model) == "lm_head"
    assert quantize(model, "int8", keep_head=True) == 21
    assert model.get_output_embeddings() is head


def test_routers_are_left_alone() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(8, 4), "gate_proj": nn.Linear(8, 8), "expert": nn.Linear(8, 8)})
    assert quantizable(model) == ["gate_proj", "expert"]


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    assert quantizable(nn.Sequential(Special(8, 8), nn.Linear(8, 8))) == ["1"]


def test_originals_are_freed_one_by_one() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["llama"]())
    weights = [weakref.ref(model.get_submodule(name).weight) for name in quantizable(model)]
    alive: list[int] = []

    def count(done: int, total: int) -> None:
        alive.append(sum(weight() is not None for weight in weights))

    quantize(model, "int8", progress=count)
    assert max(left + done for done, left in enumerate(alive, start=1)) <= len(weights) + 1
    assert alive[-1] <= 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_memory_is_as_planned(name: str, scheme: Scheme) -> None:
    config = tiny_models.SUPPORTED[name]()
    model = tiny_models.build(copy.deepcopy(config), dtype=torch.bfloat16)
    quantize(model, scheme, group_size=16)
    planned = planned_bytes(config, scheme, dtype=torch.bfloat16, group_size=16)
    assert inspect_model(model, "x").weight_bytes == pytest.approx(planned, rel=0.02)


def test_the_formula_of_a_layer() -> None:
    assert layer_bytes(1024, 3072, "int8") == 1024 * 3072 + 4 * 3072
    assert layer_bytes(1024, 3072, "int4") == 1024 * 3072 // 2 + 2 * 3072 * 32
    assert layer_bytes(1024, 3072, "int4", group_size=128, bias=True) == 1024 * 3072 // 2 + 2 * 3072 * 8 + 4 * 3072
    assert layer_bytes(50, 10, "int4") == 52 * 16 + 4 * 16, "no whole groups: int8, padded"


def test_a_plan_allocates_nothing() -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    config = LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8)
    weights = planned_bytes(config, "int4", dtype=torch.bfloat16)
    assert 36e9 < weights < 40e9, "a 70 B model of 4.5 bits a weight"


def test_a_quantized_model_is_served_as_it_computes() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["gemma3_text"]())
    assert quantize(model, "int8")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    probe(inspect_model(model, "x"), select_backend("torch", torch.device("cpu")))
