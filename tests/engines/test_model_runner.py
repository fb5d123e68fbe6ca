from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.attention import select_backend
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.loading import LoadedModel, inspect_model
from engines.model_runner import ModelRunner
from tests.engines import tiny_models
from tests.engines.fake_device import DEVICE, FakeDevice

BLOCK_SIZE = 4
TOKENS = [5, 17, 40, 8, 23, 60, 11, 90, 33, 71, 9, 26]


def eager_logits(loaded: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([token_ids])).logits[0]
    loaded.model.set_attn_implementation("outrider")
    return logits


def item(start: int, stop: int, table: list[int], rows: int, **extra: object) -> BatchItem:
    return BatchItem(TOKENS, start, stop, (), array("i", table), rows, **extra)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_models.load("llama")


@pytest.fixture
def runner(loaded: LoadedModel) -> ModelRunner:
    return ModelRunner(loaded, select_backend("auto", loaded.device), num_blocks=8, block_size=BLOCK_SIZE)


def forward(runner: ModelRunner, *items: BatchItem) -> torch.Tensor:
    return runner.forward(build_batch(items, BLOCK_SIZE, torch.device("cpu")))


def test_chunks_and_decode_equal_one_eager_pass(loaded: LoadedModel, runner: ModelRunner) -> None:
    table = [5, 2, 7]
    parts = [forward(runner, item(a, b, table, b - a)) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(parts), eager_logits(loaded, TOKENS), rtol=1e-4, atol=1e-4)


def test_only_wanted_rows_come_back_in_order(loaded: LoadedModel, runner: ModelRunner) -> None:
    expected = eager_logits(loaded, TOKENS)
    logits = forward(runner, item(0, 9, [5, 2, 7], 2), item(0, 4, [1], 1, num_copies=2), item(0, 3, [0], 0))
    assert logits.shape == (5, tiny_models.VOCAB_SIZE)
    torch.testing.assert_close(logits, expected[[7, 8, 3, 3, 3]], rtol=1e-4, atol=1e-4)


def test_a_step_may_want_no_logits(runner: ModelRunner) -> None:
    assert forward(runner, item(0, 4, [1], 0)).shape == (0, tiny_models.VOCAB_SIZE)


def test_model_without_logits_to_keep_gives_the_same_rows(loaded: LoadedModel) -> None:
    class Whole(type(loaded.model)):
        """Projects all rows, whatever is asked."""

        def forward(self, input_ids: object, position_ids: object, use_cache: bool) -> object:
            return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    model = Whole(loaded.model.config)
    model.load_state_dict(loaded.model.state_dict())
    whole = ModelRunner(inspect_model(model, "x"), select_backend("auto", loaded.device), 8, BLOCK_SIZE)
    kept = ModelRunner(loaded, select_backend("auto", loaded.device), 8, BLOCK_SIZE)
    step = (item(0, 9, [5, 2, 7], 2), item(0, 4, [1], 1))
    torch.testing.assert_close(forward(whole, *step), forward(kept, *step))


def test_copied_blocks_continue_like_the_original(loaded: LoadedModel, runner: ModelRunner) -> None:
    forward(runner, item(0, 11, [0, 1, 2], 0))
    runner.copy_blocks([(2, 6)])
    logits = forward(runner, item(11, 12, [0, 1, 6], 1))
    torch.testing.assert_close(logits[0], eager_logits(loaded, TOKENS)[11], rtol=1e-4, atol=1e-4)


def test_copies_read_all_sources_first(runner: ModelRunner) -> None:
    for number, cache in enumerate(runner.kv_tensors):
        cache.copy_(torch.arange(8.0).view(-1, 1, 1, 1).expand_as(cache) + 10 * number)
    runner.copy_blocks([(1, 2), (2, 1), (1, 3)])
    runner.copy_blocks([])
    for number, cache in enumerate(runner.kv_tensors):
        assert (cache[:, 0, 0, 0] - 10 * number).tolist() == [0, 2, 1, 1, 4, 5, 6, 7]


def test_bytes_per_block_is_what_is_allocated(loaded: LoadedModel, runner: ModelRunner) -> None:
    allocated = sum(cache.nbytes for cache in runner.kv_tensors)
    assert ModelRunner.bytes_per_block(loaded, BLOCK_SIZE) * runner.num_blocks == allocated


def test_fresh_cache_is_zero(runner: ModelRunner) -> None:
    assert all(not cache.any() for cache in runner.kv_tensors)


def test_two_models_in_one_process_keep_apart(loaded: LoadedModel, runner: ModelRunner) -> None:
    other = tiny_models.load("qwen3")
    draft = ModelRunner(other, select_backend("auto", other.device), num_blocks=8, block_size=BLOCK_SIZE)
    for a, b in ((0, 6), (6, 9)):
        step = item(a, b, [3, 1, 0], b - a)
        target_logits, draft_logits = forward(runner, step), forward(draft, step)
    torch.testing.assert_close(target_logits, eager_logits(loaded, TOKENS)[6:9], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draft_logits, eager_logits(other, TOKENS)[6:9], rtol=1e-4, atol=1e-4)


def test_block_size_of_the_batch_must_be_the_runners(runner: ModelRunner) -> None:
    with pytest.raises(AssertionError):
        runner.forward(build_batch([item(0, 4, [1], 1)], BLOCK_SIZE + 1, torch.device("cpu")))


class Passing:
    """Writes keys and values, and gives something of the query back: nothing in it could make the host wait."""

    name = "passing"
    block_multiple = 1

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch, **_: object
    ) -> Tensor:
        keys.flatten(0, 1).index_copy_(0, batch.slot_mapping, key)
        values.flatten(0, 1).index_copy_(0, batch.slot_mapping, value)
        return query[..., :1].expand(*query.shape[:2], value.shape[2])


def moved(loaded: LoadedModel, device: FakeDevice) -> LoadedModel:
    """The same model, its weights on the fake device."""
    for module in loaded.model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: device.hold(each.detach()) for name, each in tensors.items() if each is not None}
    return replace(loaded, device=DEVICE)


class TestOnADevice:
    """The host hands a step over and goes on, in transformers' own code as well (architectures without experts)."""

    ITEMS = (item(0, 9, [5, 2, 7], 2), item(4, 5, [1, 3], 1, num_copies=1))

    @pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
    def test_a_forward_is_sent_in_one_copy_and_not_waited_for(self, name: str) -> None:
        loaded = tiny_models.load(name)
        expected = forward(ModelRunner(loaded, Passing(), 8, BLOCK_SIZE), *self.ITEMS)
        with FakeDevice() as device:
            runner = ModelRunner(moved(loaded, device), Passing(), 8, BLOCK_SIZE)
            logits = device.values(runner.forward(build_batch(self.ITEMS, BLOCK_SIZE, DEVICE)))
        assert (device.num_sent, device.num_reads) == (1, 0)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)

    def test_nor_is_copying_blocks(self) -> None:
        loaded = replace(tiny_models.load("llama"), device=DEVICE)
        with FakeDevice() as device:
            runner = ModelRunner(loaded, Passing(), 8, BLOCK_SIZE)
            caches = [device.values(cache) for cache in runner.kv_tensors]
            for cache in caches:
                cache += torch.arange(8).view(8, 1, 1, 1)
            runner.copy_blocks([(1, 6), (6, 2)])
        assert (device.num_sent, device.num_reads) == (1, 0)
        assert all(cache[:, 0, 0, 0].tolist() == [0, 1, 6, 3, 4, 5, 1, 7] for cache in caches)
