"""Prompts for the demo fleet, from text that it was never trained on: completing code, editing code, and chat.

They come from the running interpreter's own library, so any machine has them; another Python version words some of
them differently. All choices follow the seed.
"""

from __future__ import annotations

import ast
import keyword
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedTokenizerFast

from demo.chats import ChatWriter
from demo.corpus import Document, source_documents, stdlib_folder
from demo.definitions import source_definitions

Workload = Literal["code", "edit", "chat"]
WORKLOADS: tuple[Workload, ...] = get_args(Workload)

# By name, as demo/README.md lists them: the split that the recipe draws differs with the interpreter's modules.
HELD_OUT_MODULES = frozenset(
    {"_strptime", "compileall", "decimal", "difflib", "genericpath", "imghdr", "locale", "signal"}
)
CODE_TOKENS = (100, 250)
SNIPPET_TOKENS = (60, 100)
_NEW_NAMES = ("entry", "source", "given", "chosen", "thing")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request starts from; `prediction` is what its client expects the output to be, None without a guess."""

    token_ids: tuple[int, ...]
    prediction: tuple[int, ...] | None = None


def prompts(
    workload: Workload, tokenizer: PreTrainedTokenizerFast, count: int = 32, seed: int = 0
) -> tuple[Prompt, ...]:
    """`count` distinct prompts of a workload, as tokens of a demo model's `tokenizer`.

    "code" is the beginning of a function or class, cut at a line's end: 100 to 250 tokens. "edit" holds a snippet of
    60 to 100 tokens, a comment that asks for it again with a name changed, and the first two lines of the answer; the
    prediction is what follows in the original. "chat" is a conversation up to the assistant's turn. Raises ValueError
    if there are fewer than `count`.
    """
    makers = {"code": _code_prompts, "edit": _edit_prompts, "chat": _chat_prompts}
    candidates = list(dict.fromkeys(makers[workload](tokenizer, random.Random(seed))))
    if count > len(candidates):
        raise ValueError(f"{count} {workload} prompts were asked for, {len(candidates)} can be made")
    return tuple(random.Random(seed).sample(candidates, count))


def held_out_documents() -> list[Document]:
    """The library's modules that no demo model was trained on, in path order."""
    return [document for document in source_documents(stdlib_folder()) if document.module in HELD_OUT_MODULES]


def _code_prompts(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Prompt]:
    for lines in _definition_lines(ast.FunctionDef, ast.ClassDef):
        low, high = CODE_TOKENS
        beginning = _whole_lines(lines, rng.randint(low, high), tokenizer)
        token_ids = tuple(tokenizer.encode(beginning))
        if len(token_ids) >= low:
            yield Prompt(token_ids)


def _edit_prompts(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Prompt]:
    for lines in _definition_lines(ast.FunctionDef):
        low, high = SNIPPET_TOKENS
        snippet = _whole_lines(lines, high, tokenizer)
        begun, rest = _split_lines(snippet, 2)
        name = _name_to_change(snippet, rest)
        # A blank line would be one token with the line end before it, so the prompt cannot end there.
        if name is None or len(tokenizer.encode(snippet)) < low or rest.startswith("\n"):
            continue
        new_name = rng.choice([candidate for candidate in _NEW_NAMES if candidate not in snippet])
        begun = re.sub(rf"\b{name}\b", new_name, begun)
        text = f"{snippet}\n\n# The same with {name} renamed to {new_name}.\n\n{begun}"
        yield Prompt(tuple(tokenizer.encode(text)), tuple(tokenizer.encode(rest)))


def _chat_prompts(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Prompt]:
    writer = ChatWriter(rng.randrange(2**32))
    for document in held_out_documents():
        for definition in source_definitions(document):
            for chat in writer.about(definition):
                asked = list(chat.messages[:-1])
                text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
                assert isinstance(text, str)  # token ids only where they are asked for
                yield Prompt(tuple(tokenizer.encode(text)))


def _definition_lines(*kinds: type[ast.FunctionDef | ast.ClassDef]) -> Iterator[list[str]]:
    """Lines of every definition of one of the `kinds`, nested ones as well, line ends kept."""
    for document in held_out_documents():
        lines = document.text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, kinds):
                yield lines[node.lineno - 1 : node.end_lineno]


def _whole_lines(lines: list[str], max_tokens: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """As many leading lines as fit `max_tokens`, without blank ones at the end."""
    text = ""
    for line in lines:
        if len(tokenizer.encode(text + line)) > max_tokens:
            break
        text += line
    return text.rstrip() + "\n"


def _split_lines(text: str, count: int) -> tuple[str, str]:
    lines = text.splitlines(keepends=True)
    return "".join(lines[:count]), "".join(lines[count:])


def _name_to_change(snippet: str, rest: str) -> str | None:
    """The parameter or variable of `snippet` that occurs most often in `rest`, the first among equals, or None."""
    signature = re.findall(r"\b[a-z_]\w+\b", snippet.partition("\n")[0].partition("(")[2])
    assigned = re.findall(r"^ *([a-z_]\w+) = ", snippet, re.MULTILINE)
    names = set(signature + assigned) - {"self", "cls"} - set(keyword.kwlist)
    counts = Counter(word for word in re.findall(r"\w+", rest) if word in names)
    return counts.most_common(1)[0][0] if counts else None
