"""The losses: next-token cross-entropy, and KL divergence to the target's kept probabilities."""

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from demo.model import logits_of, maybe_compiled
from demo.stream import TokenStream
from demo.teacher import Teacher
from demo.training import StepLoss

SMALLEST_PROB = 1e-6  # fp16 and rounding can make a tail vanish


def text_loss(model: LlamaForCausalLM, stream: TokenStream, compiled: bool = False) -> StepLoss:
    """Mean cross-entropy of the next token in the windows, nats."""
    place = next(model.parameters()).device

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, tokens)[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    forward = maybe_compiled(loss, compiled)
    return lambda indices, length: forward(stream.windows(length, indices).to(place))


def distillation_loss(
    model: LlamaForCausalLM, stream: TokenStream, teacher: Teacher, teacher_weight: float, compiled: bool = False
) -> StepLoss:
    """KL from the teacher's cut distribution to the model's, mixed with cross-entropy on the text; nats a token."""
    place = next(model.parameters()).device

    def loss(tokens: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        log_probs = logits_of(model, tokens)[:, :-1].float().log_softmax(-1)
        text = -log_probs.gather(-1, tokens[:, 1:, None]).mean()
        divergence = cut_divergence(log_probs, ids[:, :-1], probs[:, :-1]).mean()
        return teacher_weight * divergence + (1 - teacher_weight) * text

    forward = maybe_compiled(loss, compiled)

    def step_loss(indices: list[int], length: int) -> torch.Tensor:
        taught = teacher.probs(indices, length)
        tokens = stream.windows(length, indices)
        return forward(tokens.to(place), taught.ids.to(place), taught.probs.to(place))

    return step_loss


def cut_divergence(log_probs: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """KL of two distributions after lumping all tokens outside `ids` into one: `[batch, length]`, nats.

    `log_probs` `[batch, length, vocab]` are the model's; `probs` `[batch, length, k]` the teacher's at `ids`.
    """
    kept = log_probs.gather(-1, ids)
    tail = (1 - probs.sum(-1)).clamp_min(SMALLEST_PROB)
    model_tail = (1 - kept.exp().sum(-1)).clamp_min(SMALLEST_PROB)
    inside = (probs * (probs.clamp_min(SMALLEST_PROB).log() - kept)).sum(-1)
    return inside + tail * (tail.log() - model_tail.log())
