"""What the demo models are worth: held-out loss, and how often a smaller model says what the target says."""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo.model import generate
from demo.stream import ROW_TOKENS, TokenStream
from demo.tokenizer import ASSISTANT, END_OF_TURN, token_id

ROWS_A_FORWARD = 2
GREEDY_PROMPT_TOKENS = 64
GREEDY_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Fit:
    """Held-out loss of one model: nats a token, and bits a byte of the text."""

    loss: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a smaller model agrees with the target, as means over positions.

    `greedy` is the share of positions with the same most probable token; `overlap` is the sum over tokens of the
    smaller of the two probabilities (1 - total variation), the acceptance rate of a sampled draft token at
    temperature 1 (arXiv 2211.17192).
    """

    greedy: float
    overlap: float


def answer_positions(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Which next tokens are the assistant's, its end of turn included: bool `[batch, length - 1]`."""
    starts = tokens.eq(token_id(tokenizer, ASSISTANT))
    ends = tokens.eq(token_id(tokenizer, END_OF_TURN))
    mask = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
    for row in range(tokens.shape[0]):
        is_answer = False
        for position in range(tokens.shape[1] - 1):
            is_answer = (is_answer or bool(starts[row, position])) and not bool(ends[row, position])
            mask[row, position] = is_answer
    return mask


@torch.no_grad()
def fit(model: LlamaForCausalLM, stream: TokenStream, tokenizer: PreTrainedTokenizerFast) -> Fit:
    """Loss of `model` over the rows of `stream`, each read with no context before it."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for tokens in _batches(stream):
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        nats += functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()
        num_tokens += tokens[:, 1:].numel()
        num_bytes += sum(len(text.encode()) for text in tokenizer.batch_decode(tokens[:, 1:]))
    return Fit(nats / num_tokens, nats / torch.log(torch.tensor(2.0)).item() / num_bytes)


@torch.no_grad()
def agreement(
    model: LlamaForCausalLM,
    target: LlamaForCausalLM,
    stream: TokenStream,
    answers_of: PreTrainedTokenizerFast | None = None,
) -> Agreement:
    """Agreement of `model` with `target` over `stream`; with a tokenizer, over the assistant's answers alone."""
    same, overlap, count = 0.0, 0.0, 0
    for tokens in _batches(stream):
        mask = answer_positions(tokens, answers_of) if answers_of else torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        model_logits = model(input_ids=tokens).logits[:, :-1][mask]
        target_logits = target(input_ids=tokens).logits[:, :-1][mask]
        same += (model_logits.argmax(-1) == target_logits.argmax(-1)).sum().item()
        overlap += torch.minimum(model_logits.softmax(-1), target_logits.softmax(-1)).sum().item()
        count += int(mask.sum())
    return Agreement(same / count, overlap / count)


@torch.no_grad()
def greedy_agreement_on_own_text(model: LlamaForCausalLM, target: LlamaForCausalLM, prompts: torch.Tensor) -> float:
    """Share of the target's own greedy tokens after `prompts` `[batch, length]` that are the model's choice too.

    It is the acceptance rate of greedy speculation, which always drafts from text the target wrote.
    """
    written = generate(target, prompts, GREEDY_NEW_TOKENS)
    choices = model(input_ids=written).logits[:, :-1].argmax(-1)
    new = slice(prompts.shape[1] - 1, None)
    return float(choices[:, new].eq(written[:, 1:][:, new]).float().mean())


def _batches(stream: TokenStream) -> list[torch.Tensor]:
    rows = range(stream.num_rows)
    return [stream.windows(ROW_TOKENS, rows[start : start + ROWS_A_FORWARD]) for start in rows[::ROWS_A_FORWARD]]
