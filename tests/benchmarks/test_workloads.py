"""The prompts are distinct, reproducible, of the stated sizes, and from text the demo models never saw."""

import itertools
import re
from typing import cast

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.upscale import DEMO_TARGET
from benchmarks.workloads import (
    CODE_TOKENS,
    HELD_OUT_MODULES,
    SNIPPET_TOKENS,
    WORKLOADS,
    Workload,
    held_out_documents,
    prompts,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(DEMO_TARGET))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_prompts_are_distinct_and_follow_the_seed(tokenizer: PreTrainedTokenizerFast, workload: Workload) -> None:
    first = prompts(workload, tokenizer)
    assert len({prompt.token_ids for prompt in first}) == 32
    assert prompts(workload, tokenizer) == first
    assert prompts(workload, tokenizer, seed=1) != first
    assert all(0 <= token_id < len(tokenizer) for prompt in first for token_id in prompt.token_ids)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_asking_for_too_many_is_refused(tokenizer: PreTrainedTokenizerFast, workload: Workload) -> None:
    with pytest.raises(ValueError, match=f"10000 {workload} prompts"):
        prompts(workload, tokenizer, count=10_000)


def test_the_modules_are_those_that_the_shipped_models_did_not_train_on() -> None:
    report = (DEMO_TARGET.parents[1] / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"Held out, by top-level module:\n(.*?)\.\n", report, re.DOTALL)
    assert listed
    assert {name for name in re.split(r",\s+", listed[1].strip()) if not name.startswith("topic-")} == HELD_OUT_MODULES
    assert {document.module for document in held_out_documents()} == HELD_OUT_MODULES


def test_code_is_a_prefix_of_a_definition_cut_at_a_line(tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [document.text for document in held_out_documents()]
    for prompt in prompts("code", tokenizer, 64):
        assert CODE_TOKENS[0] <= len(prompt.token_ids) <= CODE_TOKENS[1]
        assert prompt.prediction is None
        text = tokenizer.decode(prompt.token_ids)
        assert re.match(r"\s*(def|class) ", text)
        assert text.endswith("\n")
        assert any(text in source for source in sources)


def test_no_code_prompt_begins_with_another(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = sorted(tokenizer.decode(prompt.token_ids) for prompt in prompts("code", tokenizer, 64))
    assert not any(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_an_edit_holds_the_original_and_predicts_the_rest_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [document.text for document in held_out_documents()]
    for prompt in prompts("edit", tokenizer, 48):
        assert prompt.prediction is not None
        text, rest = tokenizer.decode(prompt.token_ids), tokenizer.decode(prompt.prediction)
        request = re.search(r"\n\n\n# The same with (\w+) renamed to (\w+)\.\n\n", text)
        assert request
        snippet, begun = text[: request.start() + 1], text[request.end() :]
        assert any(snippet in source for source in sources)
        assert SNIPPET_TOKENS[0] <= len(tokenizer.encode(snippet)) <= SNIPPET_TOKENS[1]
        name, new_name = request.groups()
        assert re.sub(rf"\b{name}\b", new_name, snippet) == begun + re.sub(rf"\b{name}\b", new_name, rest)
        assert name in rest
        assert new_name not in snippet


def test_the_prediction_continues_the_prompt_token_by_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in prompts("edit", tokenizer, 48):
        assert prompt.prediction is not None
        whole = (*prompt.token_ids, *prompt.prediction)
        assert tuple(tokenizer.encode(tokenizer.decode(whole))) == whole


def test_a_chat_ends_where_the_assistant_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts("chat", tokenizer, 100)]
    assert all(text.endswith("<|end|>\n<|assistant|>\n") for text in texts)
    assert all(text.startswith(("<|user|>\n", "<|system|>\n")) for text in texts)
    assert any(text.count("<|user|>") == 2 for text in texts)
    names = "|".join(module.lstrip("_") for module in HELD_OUT_MODULES)
    assert all(re.search(names, text) for text in texts)
