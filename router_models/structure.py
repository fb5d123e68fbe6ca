"""The shape of a request as numbers: length, options, code, mathematics, questions, constraints, conversation.

Every number is cheap, bounded in effect by a logarithm or a share, and has a name, so that a receipt can show it.
"""

from __future__ import annotations

import math
import string
import zlib
from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np
from numpy.typing import NDArray

from router_models.lexicon import (
    CODE,
    CORRECTION,
    LATEX,
    LEXICON,
    NAME,
    NUMBER,
    OPTION,
    SENTENCE_END,
    SHOT,
    WORD,
    YEAR,
)
from router_models.prompt import Prompt

_COMPRESSED_BYTES = 4_000
_LONG_WORD = 9


def structure(prompt: Prompt) -> dict[str, float]:
    """The named numbers of one request, in a fixed order."""
    text = prompt.text
    options = [match.group(2) for match in OPTION.finditer(text)]
    first = OPTION.search(text)
    stem = text[: first.start()] if first else text
    words = WORD.findall(text)
    stem_words = WORD.findall(stem) if first else words
    return {
        **_size(text, words),
        **_characters(text),
        **_mathematics(text),
        **_names(text, stem, len(words)),
        **_layout(text, stem, len(stem_words)),
        **_options(options, stem_words),
        **_lexicon(text, stem),
        **_conversation(prompt),
    }


def vectors(prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """Float32 [num_prompts, num_features], columns as `feature_names`."""
    rows = [prompt.structure or tuple(structure(prompt).values()) for prompt in prompts]
    return np.array(rows, dtype=np.float32).reshape(len(prompts), len(FEATURE_NAMES))


def _size(text: str, words: Sequence[str]) -> dict[str, float]:
    lines = text.split("\n")
    num_words = max(len(words), 1)
    data = text.encode(errors="replace")[:_COMPRESSED_BYTES]
    return {
        "log_chars": math.log1p(len(text)),
        "log_words": math.log1p(len(words)),
        "log_lines": math.log1p(len(lines)),
        "log_longest_line": math.log1p(max(map(len, lines))),
        "word_length": sum(map(len, words)) / num_words,
        "long_word_share": sum(len(word) >= _LONG_WORD for word in words) / num_words,
        "distinct_word_share": len({word.lower() for word in words}) / num_words,
        "compressibility": len(zlib.compress(data, 1)) / max(len(data), 1),
    }


def _characters(text: str) -> dict[str, float]:
    num_chars = max(len(text), 1)
    return {
        "digit_share": _num_digits(text) / num_chars,
        "upper_share": _num_upper(text) / num_chars,
        "non_ascii_share": 1 - len(text.encode("ascii", "ignore")) / num_chars if text else 0.0,
        "punctuation_share": _occurrences(text, ",;:()[]{}\"'") / num_chars,
        "symbol_share": _occurrences(text, "=+*/^<>|_\\") / num_chars,
    }


def _mathematics(text: str) -> dict[str, float]:
    numbers = NUMBER.findall(text)
    return {
        "dollars": math.log1p(text.count("$")),
        "equals": math.log1p(text.count("=")),
        "latex": math.log1p(len(LATEX.findall(text))),
        "numbers": math.log1p(len(numbers)),
        "longest_number": max((min(len(number), 12) for number in numbers), default=0),
        "decimals": math.log1p(max(text.count(".") - len(SENTENCE_END.findall(text)), 0)),
        "years": math.log1p(len(YEAR.findall(text))),
    }


def _names(text: str, stem: str, num_words: int) -> dict[str, float]:
    num_names = len(NAME.findall(text))
    return {
        "name_share": num_names / max(num_words, 1),
        "names": math.log1p(num_names if stem == text else len(NAME.findall(stem))),
    }


def _layout(text: str, stem: str, num_stem_words: int) -> dict[str, float]:
    lines, end = text.split("\n"), stem.rstrip()
    num_sentences = max(len(SENTENCE_END.findall(stem)), 1)
    return {
        "questions": math.log1p(text.count("?")),
        "sentences": math.log1p(num_sentences),
        "sentence_words": num_stem_words / num_sentences,
        "quotes": math.log1p(_occurrences(text, '"“')),
        "parentheses": math.log1p(text.count("(")),
        "blank": float("__" in text or "..." in text),
        "code_words": math.log1p(len(CODE.findall(text))),
        "code_block": float("```" in text or "[PYTHON]" in text or "def " in text),
        "indented_share": sum(line.startswith(("    ", "\t")) for line in lines) / len(lines),
        "pipes": math.log1p(text.count("|")),
        "shots": math.log1p(len(SHOT.findall(text))),
        "log_stem_chars": math.log1p(len(stem)),
        "stem_asks": float(end.endswith("?")),
        "stem_is_open": float(end.endswith((":", ",", "_"))),
        "stem_ends_in_word": float(end[-1:].isalpha()),
        "ends_in_answer": float(text.rstrip().endswith("Answer:")),
    }


def _options(options: Sequence[str], stem_words: Sequence[str]) -> dict[str, float]:
    lengths = [len(option) for option in options] or [0]
    num_options, num_chars = max(len(options), 1), max(sum(lengths), 1)
    return {
        "options": len(options),
        "option_chars": math.log1p(fmean(lengths)),
        "option_chars_spread": math.log1p(pstdev(lengths)),
        "longest_option": math.log1p(max(lengths)),
        "option_words": math.log1p(sum(len(option.split()) for option in options) / num_options),
        "numeric_option_share": sum(option.lstrip(" $€£-+")[:1].isdigit() for option in options) / num_options,
        "option_digit_share": sum(sum(map(str.isdigit, option)) for option in options) / num_chars,
        "capital_option_share": sum(option[:1].isupper() for option in options) / num_options,
        "options_in_stem": _overlap(options, stem_words),
        "option_likeness": _likeness(options),
    }


def _overlap(options: Sequence[str], stem_words: Sequence[str]) -> float:
    """Mean share of an option's words that the question also has."""
    words = {word.lower() for word in stem_words if len(word) > 3}
    shares = [len(_words(option) & words) / max(len(option.split()), 1) for option in options]
    return fmean(shares) if shares else 0.0


def _likeness(options: Sequence[str]) -> float:
    """Mean Jaccard similarity of all pairs of options."""
    sets = [_words(option) for option in options]
    pairs = [len(a & b) / max(len(a | b), 1) for i, a in enumerate(sets) for b in sets[:i]]
    return fmean(pairs) if pairs else 0.0


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


def _lexicon(text: str, stem: str) -> dict[str, float]:
    counts = {f"words_{name}": math.log1p(len(pattern.findall(stem))) for name, pattern in LEXICON.items()}
    return counts | {"has_all_of_these": float(LEXICON["all_of_these"].search(text) is not None)}


def _conversation(prompt: Prompt) -> dict[str, float]:
    users = prompt.user_turns
    chars = {role: sum(len(turn.text) for turn in prompt.turns if turn.role == role) for role in ("assistant", "tool")}
    system = sum(len(turn.text) for turn in prompt.turns if turn.role in ("system", "developer"))
    return {
        "user_turns": math.log1p(max(len(users), 1) - 1),
        "log_earlier_chars": math.log1p(sum(map(len, users[:-1]))),
        "log_system_chars": math.log1p(system),
        "log_assistant_chars": math.log1p(chars["assistant"]),
        "log_tool_chars": math.log1p(chars["tool"]),
        "is_correction": float(len(users) > 1 and CORRECTION.match(users[-1]) is not None),
        "tools": math.log1p(prompt.num_tools),
        "wants_json": float(prompt.response_format == "json"),
        "log_max_tokens": math.log1p(prompt.max_tokens or 0),
    }


def _num_digits(text: str) -> int:
    # Character by character takes ten times as long, which is most of a long prompt's features.
    return _occurrences(text, string.digits) if text.isascii() else sum(map(str.isdigit, text))


def _num_upper(text: str) -> int:
    return _occurrences(text, string.ascii_uppercase) if text.isascii() else sum(map(str.isupper, text))


def _occurrences(text: str, characters: str) -> int:
    return sum(map(text.count, characters))


FEATURE_NAMES: tuple[str, ...] = tuple(structure(Prompt.from_text("")))
CONVERSATION_NAMES: tuple[str, ...] = tuple(_conversation(Prompt.from_text("")))
