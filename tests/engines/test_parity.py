from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PretrainedConfig

from engines.attention.batched import BatchedAttention
from engines.attention.dispatch import ATTENTION_NAME
from engines.attention.reference import ReferenceAttention
from engines.errors import UnsupportedModelError
from engines.loading import LoadedModel, check_servable, inspect_model
from engines.parity import probe
from tests.engines import tiny_models


@pytest.mark.parametrize("backend", [ReferenceAttention, BatchedAttention])
@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_supported_architectures_pass(name: str, backend: type) -> None:
    report = probe(tiny_models.load(name), backend())
    assert set(report.errors) == {"prefill", "chunk", "decode", "verify"}
    assert max(report.errors.values()) < 1e-5
    assert report.backend in ("reference", "torch")


@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_supported_architectures_pass_in_bfloat16(name: str) -> None:
    report = probe(tiny_models.load(name, dtype=torch.bfloat16), BatchedAttention())
    assert max(report.errors.values()) < report.tolerance <= 0.1


@pytest.mark.parametrize("name", tiny_models.REFUSED)
def test_unsupported_architectures_are_refused_by_name(name: str) -> None:
    make_config, reason = tiny_models.REFUSED[name]

    def serve(config: PretrainedConfig) -> None:
        check_servable(config)
        probe(inspect_model(tiny_models.build(config), "x"), BatchedAttention())

    with pytest.raises(UnsupportedModelError, match=reason):
        serve(make_config())


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_windows_are_found_and_probed(name: str) -> None:
    report = probe(tiny_models.load(name), BatchedAttention())
    assert report.probed_windows == (tiny_models.WINDOW,)
    assert report.unprobed_windows == ()


def test_long_window_is_reported_as_unprobed() -> None:
    config = tiny_models.SUPPORTED["mistral"]()
    config.sliding_window = 400
    report = probe(inspect_model(tiny_models.build(config), "x"), BatchedAttention())
    assert report.unprobed_windows == (400,)
    assert "too long to probe: (400,)" in report.summary()


def test_attention_implementation_is_restored_even_after_refusal() -> None:
    loaded = tiny_models.load("llama")
    with pytest.raises(UnsupportedModelError):
        probe(loaded, Broken(scaling=2.0))
    assert loaded.model.config._attn_implementation == ATTENTION_NAME
    probe(loaded, BatchedAttention())


class Broken(ReferenceAttention):
    """Changes one thing about each call."""

    def __init__(self, **changes: object) -> None:
        self.changes = changes

    def attend(self, *tensors: Tensor, **options: object) -> Tensor:
        return super().attend(*tensors, **(options | self.changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": tiny_models.WINDOW + 1}),
        ("mistral", {"sliding_window": tiny_models.WINDOW - 1}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
        ("llama", {"scaling": 0.25}),
        ("gemma3_text", {"sliding_window": None}),
    ],
)
def test_a_backend_that_ignores_something_is_caught(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModelError, match="differs from its own eager output"):
        probe(tiny_models.load(name), Broken(**changes))


class Unwritten(ReferenceAttention):
    """Loses keys and values of single rows."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object) -> Tensor:
        return super().attend(query, key * 0 if len(query) == 2 else key, value, *rest, **options)


def test_the_message_names_architecture_step_and_size() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        probe(tiny_models.load("llama"), Unwritten())
    assert "LlamaForCausalLM (llama) cannot be served" in caught.value.message
    assert "chunk step" in caught.value.message
    assert "\n" not in caught.value.message


class Leaky(BatchedAttention):
    """Reads one slot too many."""

    def attend(self, query: Tensor, *rest: object, **options: object) -> Tensor:
        key_cache = rest[2]
        return super().attend(query, *rest, **options) + key_cache.sum() * 0


def test_reading_an_unwritten_slot_is_caught() -> None:
    with pytest.raises(UnsupportedModelError, match="inf"):
        probe(tiny_models.load("llama"), Leaky())


class Remembering(LlamaForCausalLM):
    """Adds a trace of the tokens before to every row: state outside of the KV cache, as in recurrent layers."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> object:
        output = super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        output.logits = output.logits.cumsum(1)
        return output


class Peeking(LlamaForCausalLM):
    """Lets later tokens change earlier rows."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> object:
        output = super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        output.logits = output.logits.flip(1).cumsum(1).flip(1)
        return output


def _wrapped(kind: type[LlamaForCausalLM]) -> LoadedModel:
    config = tiny_models.SUPPORTED["llama"]()
    torch.manual_seed(0)
    model = kind(config)
    model.set_attn_implementation(ATTENTION_NAME)
    return inspect_model(model, "x")


def test_state_outside_of_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Remembering.*differs from its own eager output"):
        probe(_wrapped(Remembering), BatchedAttention())


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Peeking.*is not causal"):
        probe(_wrapped(Peeking), BatchedAttention())


def test_a_context_too_short_to_probe_is_refused() -> None:
    config = tiny_models.SUPPORTED["llama"]()
    config.max_position_embeddings = 12
    with pytest.raises(UnsupportedModelError, match="takes 12 tokens; fewer than 20"):
        probe(inspect_model(tiny_models.build(config), "x"), BatchedAttention())
