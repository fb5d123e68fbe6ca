"""Rows of an evaluation set as token ids, the same for every precision of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.errors import EvaluationError, InvalidRequestError
from engines.precision.data import Row
from engines.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """`token_ids[first_scored:]` are scored, each given all before it; none if that is empty.

    `num_prompt_tokens` is how many of them a greedy answer is asked for; None where the row has no prompt.
    """

    row: Row
    token_ids: tuple[int, ...]
    first_scored: int
    num_prompt_tokens: int | None

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.first_scored

    @property
    def prompt(self) -> tuple[int, ...] | None:
        return None if self.num_prompt_tokens is None else self.token_ids[: self.num_prompt_tokens]


def encode(rows: Sequence[Row], tokenizer: Tokenizer, max_model_len: int) -> list[Example]:
    """The rows in the model's tokens; a reference is tokenized apart from its prompt, as a served answer would be.

    Raises EvaluationError, naming the line, for a row that has more than `max_model_len` tokens (a prompt has to leave
    room for one), that the chat template rejects, or that leaves nothing to read.
    """
    examples = [_encode(row, tokenizer) for row in rows]
    for example in examples:
        longest = max_model_len - (example.num_prompt_tokens == len(example.token_ids))
        if len(example.token_ids) > longest:
            raise EvaluationError(
                f"Line {example.row.line} has {len(example.token_ids)} tokens, and the engine holds {longest}."
            )
    return examples


def _encode(row: Row, tokenizer: Tokenizer) -> Example:
    if row.text is not None:
        token_ids = tokenizer.encode(row.text)
        return Example(row, token_ids, min(1, len(token_ids)), None)
    prompt = _prompt(row, tokenizer)
    if not prompt:
        raise EvaluationError(f"Line {row.line}: the prompt has no tokens.")
    reference = () if row.reference is None else tokenizer.encode(row.reference, add_special_tokens=False)
    return Example(row, (*prompt, *reference), len(prompt), len(prompt))


def _prompt(row: Row, tokenizer: Tokenizer) -> tuple[int, ...]:
    if row.messages is None:
        assert row.prompt is not None, "a row has one of text, prompt and messages"
        return tokenizer.encode(row.prompt)
    try:
        return tokenizer.apply_chat_template(row.messages)
    except InvalidRequestError as error:
        raise EvaluationError(f"Line {row.line}: {error.message}") from error
