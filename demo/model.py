"""Building, saving and loading the demo's Llama models."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.recipe import Recipe, Shape
from demo.tokenizer import save_tokenizer, stop_token_ids

WEIGHTS_FILE = "model.safetensors"
Result = TypeVar("Result")


def build_model(shape: Shape, recipe: Recipe, eos_token_id: int) -> LlamaForCausalLM:
    """A freshly initialised fp32 model of `shape`; weights follow the global torch seed."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        # The embedding is also the output layer: at 1/sqrt(hidden) the first logits have unit variance.
        initializer_range=shape.hidden_size**-0.5,
    )
    return LlamaForCausalLM(config)


def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, length, vocab]` of `tokens` `[batch, length]`, in bf16 where autocast is used."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def maybe_compiled(function: Callable[..., Result], compiled: bool) -> Callable[..., Result]:
    """`function`, through torch.compile if asked: 1.6 times as fast on two CPU cores, after a minute of compiling."""
    return torch.compile(function, dynamic=False) if compiled else function


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Stops at the end of a turn or of a text."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=stop_token_ids(tokenizer), pad_token_id=tokenizer.pad_token_id
    )


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a bf16 copy of `model` and the tokenizer to `folder`, in Hugging Face format; `model` is unchanged."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)  # type: ignore[arg-type]
    copy.config.dtype = torch.bfloat16
    copy.generation_config = generation_config(tokenizer)
    copy.save_pretrained(folder)
    (folder / WEIGHTS_FILE).chmod(0o644)  # it is written for its owner alone
    save_tokenizer(tokenizer, folder)


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    num_new_tokens: int,
    temperature: float | None = None,
    stops: bool = False,
) -> torch.Tensor:
    """`prompts` `[batch, length]` with what the model writes after them: `[batch, length + num_new_tokens]`.

    Greedy without a temperature. It writes on through stop tokens, as training text does, unless it `stops`.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=temperature is not None,
        temperature=temperature,
        top_k=0 if temperature is not None else None,
        max_new_tokens=num_new_tokens,
        eos_token_id=model.generation_config.eos_token_id if stops else [],
        pad_token_id=model.config.pad_token_id,
    )
    # The stubs do not see that a Llama model is a generative one.
    written: torch.Tensor = model.generate(  # type: ignore[misc, assignment]
        prompts.to(model.device), attention_mask=torch.ones_like(prompts, device=model.device), generation_config=config
    )
    return written.cpu()
