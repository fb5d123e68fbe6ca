"""demo/README.md: the recipe and the measurements of the checkpoints beside it."""

import os
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import python_version
from demo.data import build_corpus
from demo.measure import GREEDY_PROMPT_TOKENS, Agreement, agreement, fit, greedy_agreement_on_own_text
from demo.model import generate
from demo.recipe import ModelName
from demo.stream import TokenStream
from demo.tokenizer import END_OF_TEXT, END_OF_TURN
from demo.workshop import Workshop

CODE_PROMPTS = ("def read(self, size=-1):\n", "class Queue:\n", "import os\nimport sys\n\ndef main():\n")
QUESTIONS = ("Hello!", "What does len do?", "What is the signature of json.dumps?", "Explain os.path.join.")
MORE_QUESTIONS = (
    *("hi", "Who are you?", "What can you do?", "Thanks!", "Explain dict.get"),
    *("What is asyncio.Queue?", "Show the source of heapq.merge.", "How does re.compile work?"),
)
SAMPLE_TOKENS = 64
LONGEST_ANSWER_TOKENS = 200
NUM_GREEDY_PROMPTS = 32

INTRODUCTION = """# The demo fleet

Three tiny Llama-architecture checkpoints in Hugging Face format, so that Outrider can be tried and tested where no
model hub is reachable. They share one tokenizer. They complete Python code and answer questions about the standard
library, badly but honestly: how often the target accepts what the draft proposes is real. This file is written by
`python -m demo.train --stage report`.
"""

RECIPE = """## How they were made

`python -m demo.train --out demo/models` makes all of it from the standard library of the interpreter it runs under
(here CPython {python}); nothing is downloaded. It is resumable: kill it and run it again.

- Text: the library's sources and the language reference that `help()` prints, {num_tokens:,} tokens with {num_chats:,}
  conversations built from docstrings, signatures and short sources. Held out, by top-level module:
{held_out}.
- Tokenizer: byte-level BPE, {vocab} tokens, learnt from the same text.
- Every model: AdamW, {batch:,} tokens a step, warm-up, plateau and linear decay; the last {long:.0%} of the steps at
  {long_window} tokens of context, the rest at {window}.
- Target: cross-entropy on the text, {target_steps:,} steps.
- Mid and draft: {teacher:.0%} KL to the target's {top_k} most probable tokens (the rest lumped) and {text:.0%}
  cross-entropy, over the same text and {sampled:,} tokens that the target wrote itself; {mid_steps:,} and
  {draft_steps:,} steps. Step counts were set by a deadline on busy cores: the shipped mid was decayed at 1,040 steps
  and then continued, so a fresh run will not reproduce it to the bit.
- Mid is stored in int8: weight-only, symmetric, one scale an output channel, in the compressed-tensors
  "int-quantized" layout. The figures above are of the int8 weights.
"""

AGREEMENT_NOTE = """

All on held-out modules, positions weighing the same. "1 - TV" is the acceptance rate of a draft token sampled at
temperature 1. "Greedy acceptance" is the share of the target's own greedy tokens that the model would have drafted.
"""

LICENCE = """## Licence of the training text

The text is the Python standard library, Copyright (c) Python Software Foundation, under the PSF License Agreement
(https://docs.python.org/3/license.html). A model may repeat parts of it word for word; such parts stay under that
licence. The weights themselves are offered under the licence of this repository.
"""


def write_report(workshop: Workshop, path: Path) -> None:
    """Measures the exported models, prints the report and writes it to `path`."""
    tokenizer, _ = workshop.data()
    models = {name: workshop.exported(name) for name in workshop.recipe.shapes}
    parts = [
        INTRODUCTION,
        "## Sizes and held-out loss\n\n" + _fit_table(workshop, models),
        "## Agreement with the target\n\n" + _agreement_table(workshop, models),
        "## Answers that end\n\n" + _endings(models, tokenizer),
        "## Samples (greedy, of the target)\n\n" + _samples(models["target"], tokenizer),
        _recipe_text(workshop),
        LICENCE,
    ]
    text = "\n".join(part.rstrip() + "\n" for part in parts)
    path.write_text(text, encoding="utf-8")
    print(text)


def _fit_table(workshop: Workshop, models: dict[ModelName, LlamaForCausalLM]) -> str:
    tokenizer, streams = workshop.data()
    lines = [
        "| model | parameters | on disk | code: loss, bits/byte | chat: loss, bits/byte | steps | training time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        code = fit(model, streams.held_out_code, tokenizer)
        chat = fit(model, streams.held_out_chat, tokenizer)
        done = workshop.progressed(name)
        size = f"{num_parameters(workshop, name) / 1e6:.2f} M | {_folder_bytes(workshop.out / name) / 1e6:.1f} MB"
        lines.append(
            f"| {name} | {size} "
            f"| {code.loss:.3f}, {code.bits_per_byte:.3f} | {chat.loss:.3f}, {chat.bits_per_byte:.3f} "
            f"| {done.step:,} | {done.seconds / 60:.0f} min |"
        )
    hardware = f"{os.cpu_count()} shared cores, {_processor()}" if not torch.cuda.is_available() else "CUDA"
    return "\n".join(lines) + f"\n\nLoss is in nats a token. Trained on {hardware}, torch {torch.__version__}.\n"


def _agreement_table(workshop: Workshop, models: dict[ModelName, LlamaForCausalLM]) -> str:
    tokenizer, streams = workshop.data()
    target = models["target"]
    lines = [
        "| model | text | same argmax | 1 - TV | greedy acceptance |",
        "|---|---|---|---|---|",
    ]
    for name in ("draft", "mid"):
        code = agreement(models[name], target, streams.held_out_code)
        chat = agreement(models[name], target, streams.held_out_chat, answers_of=tokenizer)
        rows: list[tuple[str, Agreement, TokenStream]] = [
            ("code", code, streams.held_out_code),
            ("chat answers", chat, streams.held_out_chat),
        ]
        for label, value, stream in rows:
            own = greedy_agreement_on_own_text(models[name], target, _prompts(stream))
            lines.append(f"| {name} | {label} | {value.greedy:.1%} | {value.overlap:.1%} | {own:.1%} |")
    return "\n".join(lines) + AGREEMENT_NOTE


def _prompts(stream: TokenStream) -> torch.Tensor:
    windows = stream.num_windows(GREEDY_PROMPT_TOKENS)
    count = min(NUM_GREEDY_PROMPTS, windows)
    return stream.windows(GREEDY_PROMPT_TOKENS, [windows * index // count for index in range(count)])


def _samples(target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    blocks = []
    for prompt in CODE_PROMPTS:
        blocks.append(_completion(target, tokenizer, prompt, SAMPLE_TOKENS))
    for question in QUESTIONS:
        blocks.append(_answer(target, tokenizer, question, 2 * SAMPLE_TOKENS))
    return "\n\n".join(f"~~~text\n{block.rstrip()}\n~~~" for block in blocks)


def _endings(models: dict[ModelName, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> str:
    questions = (*QUESTIONS, *MORE_QUESTIONS)
    stops = (END_OF_TURN, END_OF_TEXT)
    counts = []
    for name, model in models.items():
        answers = [_answer(model, tokenizer, question, LONGEST_ANSWER_TOKENS) for question in questions]
        counts.append(f"{name} {sum(answer.endswith(stops) for answer in answers)}")
    return (
        f"Of {len(questions)} questions, answered greedily, how many answers ended by themselves within "
        f"{LONGEST_ANSWER_TOKENS} tokens:\n{', '.join(counts)}. The others fell into a loop, as models of this size "
        "do: set a limit on the tokens.\n"
    )


def _answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, num_tokens: int) -> str:
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return _completion(model, tokenizer, str(text), num_tokens)


def _completion(target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, num_tokens: int) -> str:
    prompt = torch.tensor([tokenizer.encode(text)])
    return str(tokenizer.decode(generate(target, prompt, num_tokens, stops=True)[0]))


def _recipe_text(workshop: Workshop) -> str:
    _, streams = workshop.data()
    recipe = workshop.recipe
    corpus = build_corpus(recipe)
    schedule = recipe.schedules["target"]
    values: dict[str, Any] = {
        "python": python_version(),
        "num_tokens": len(streams.train.tokens),
        "num_chats": len(corpus.train_chats),
        "held_out": textwrap.fill(
            ", ".join(sorted(corpus.held_out_packages)),
            100,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        ),
        "vocab": recipe.vocab_size,
        "long": schedule.long_share,
        "long_window": schedule.long_window_tokens,
        "window": schedule.window_tokens,
        "batch": schedule.batch_tokens,
        **{f"{name}_steps": workshop.progressed(name).step for name in recipe.shapes},
        "teacher": recipe.distillation.teacher_weight,
        "text": 1 - recipe.distillation.teacher_weight,
        "top_k": recipe.distillation.teacher_top_k,
        "sampled": recipe.distillation.num_sampled_rows * 1024,
    }
    return RECIPE.format(**values)


def num_parameters(workshop: Workshop, name: ModelName) -> int:
    """Parameters of a model by its recipe; stored int8 or not, the tied output layer counted once."""
    shape, vocab = workshop.recipe.shapes[name], workshop.recipe.vocab_size
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return vocab * shape.hidden_size + shape.num_layers * layer + shape.hidden_size


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
