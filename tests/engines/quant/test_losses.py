"""What quantization costs the demo models: loss on modules of the standard library that they were not trained on."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engines.quant.model import quantize
from engines.quant.scheme import Scheme

MODELS = Path(__file__).parents[3] / "demo" / "models"
HELD_OUT = ("difflib.py", "_strptime.py", "locale.py")  # of demo/README.md
NUM_WINDOWS, WINDOW_TOKENS = 6, 512

pytestmark = pytest.mark.skipif(not MODELS.exists(), reason="no checkpoints in demo/models")


@cache
def windows() -> Tensor:
    """int64 [NUM_WINDOWS, WINDOW_TOKENS], spread evenly over the text."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target", model_max_length=1 << 20)
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / name).read_text(encoding="utf-8") for name in HELD_OUT)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    starts = torch.linspace(0, len(ids) - WINDOW_TOKENS, NUM_WINDOWS).long().tolist()
    return torch.stack([ids[start : start + WINDOW_TOKENS] for start in starts])


def loss(model: PreTrainedModel) -> float:
    """Nats a token."""
    with torch.inference_mode():
        logits = model(windows()).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), windows()[:, 1:].flatten()).item()


def demo_model(name: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.bfloat16)
    return model


@cache
def unquantized_loss(name: str) -> float:
    return loss(demo_model(name))


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.01), ("int4", 0.05)])
@pytest.mark.parametrize("name", ["target", "draft"])
def test_loss_stays_within_the_bound(name: str, scheme: Scheme, bound: float) -> None:
    model = demo_model(name)
    quantize(model, scheme)
    assert loss(model) <= unquantized_loss(name) * (1 + bound)
