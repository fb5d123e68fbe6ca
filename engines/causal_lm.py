"""How the engine calls a transformers causal language model: flat tokens in, logits of chosen rows out."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


def takes_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether the model can skip the vocabulary projection of rows that nobody asked for."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def row_logits(
    model: PreTrainedModel, input_ids: Tensor, positions: Tensor, rows: Tensor, *, selects_rows: bool
) -> Tensor:
    """Logits [num_rows, vocab], in the model's dtype, of `rows` [num_rows] of the tokens `input_ids` [num_tokens].

    The model keeps no cache of its own. `selects_rows` is what takes_logits_to_keep says; without it all rows are
    projected and the wanted ones picked.
    """
    with torch.inference_mode():
        selected = {"logits_to_keep": rows} if selects_rows else {}
        output = model(
            input_ids=input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **selected
        )
        logits: Tensor = output.logits[0]
        return logits if selects_rows else logits.index_select(0, rows)
