"""The shipped checkpoints, as their users load them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).parents[2] / "demo" / "models"
MOST_BYTES = 40_000_000
NAMES = ("target", "mid", "draft")

pytestmark = pytest.mark.skipif(not MODELS.exists(), reason="no checkpoints in demo/models")


def test_they_are_small_enough_to_commit() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= MOST_BYTES


def greeting(name: str) -> tuple[list[int], list[int]]:
    """What a model answers to a greeting, greedily, and the ids that may end an answer."""
    if name == "mid":
        pytest.importorskip("compressed_tensors")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 2048
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, do_sample=False, max_new_tokens=64)
    return written[0, prompt["input_ids"].shape[1] :].tolist(), model.generation_config.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_each_folder_loads_on_its_own(name: str) -> None:
    answer, stops = greeting(name)
    assert len(answer) > 1
    assert stops == [4, 0]


@pytest.mark.parametrize("name", ["target", "mid"])  # the draft proposes and is not served: it may run on
def test_a_greeting_is_answered_and_ends(name: str) -> None:
    answer, stops = greeting(name)
    assert answer[-1] in stops


def test_they_share_one_tokenizer() -> None:
    assert len({(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1
