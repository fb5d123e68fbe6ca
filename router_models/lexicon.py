"""Words and marks whose number says something about how hard a request is. Part of the feature version."""

from __future__ import annotations

import re

_IGNORING_CASE = {
    "negation": r"\b(?:not|except|never|least|false|incorrect|cannot|n't|none)\b",
    "which": r"\bwhich\b",
    "which_of_these": r"which of the following",
    "what": r"\bwhat\b",
    "who": r"\bwho(?:m|se)?\b",
    "when": r"\bwhen\b",
    "where": r"\bwhere\b",
    "why": r"\bwhy\b",
    "how": r"\bhow\b",
    "how_many": r"\bhow (?:many|much|long|far|old)\b",
    "write": r"\b(?:write|implement|create|generate|complete|translate|summari[sz]e|explain|describe|list|rewrite"
    r"|classify)\b",
    "solve": r"\b(?:find|compute|calculate|determine|evaluate|solve|simplify|prove|show that|express|estimate)\b",
    "constraint": r"\b(?:must|at least|at most|exactly|only|without|no more than|should|each|every|all)\b",
    "quantity": r"\b(?:percent|ratio|rate|per|average|total|twice|half|times|probability|mean|sum|product)\b",
    "premise": r"\b(?:let|suppose|assume|given|consider|if)\b",
    "all_of_these": r"(?:all|none|both) of (?:the )?(?:above|these)|both [A-D] and",
    "statement": r"\bstatement\b",
    "you": r"\byour?\b",
    "moral": r"\b(?:wrong|moral|ought|right|ethic\w*)\b",
    "passage": r"\b(?:passage|according to|this question refers|following information|excerpt|context)\b",
    "medicine": r"\b(?:patient|year-old|symptom\w*|disease|treatment|blood|clinical|diagnos\w*)\b",
    "science": r"\b(?:energy|force|mass|velocity|molecul\w*|atom\w*|acid|reaction|temperature|pressure|electr\w*"
    r"|cell\w*|gene\w*)\b",
    "unit": r"\b(?:kg|cm|mm|km|mol|ft|lb|psi|atm|volts?|ohms?|watts?|joules?|m/s|degrees?|hours?|minutes?|seconds?"
    r"|dollars?|miles?|feet|inch(?:es)?)\b|[$€£]\s?\d|°",
    "because": r"\b(?:because|therefore|thus|hence|since|then|however)\b",
    "comparison": r"\b(?:more|less|greater|most|best|likely|primar\w+|largest|smallest|main|major)\b",
    "format": r"\b(?:json|yaml|xml|table|bullet|markdown|csv|format)\b",
}
_EXACT = {"roman": r"\b(?:II|III|IV)\b", "first_person": r"\b(?:I|my|me|we|our)\b"}

LEXICON: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE) for name, pattern in _IGNORING_CASE.items()
} | {name: re.compile(pattern) for name, pattern in _EXACT.items()}
CODE = re.compile(
    r"\b(?:def|return|import|class|for|while|if|else|lambda|print|assert|int|str|list|function|var|const|SELECT|FROM|WHERE)\b"
)
LATEX = re.compile(r"\\[a-zA-Z]+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
YEAR = re.compile(r"\b1[0-9]{3}\b|\b20[0-2][0-9]\b")
NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")
SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
WORD = re.compile(r"[A-Za-zÀ-ɏ']+|\d+(?:\.\d+)?")
OPTION = re.compile(r"^[ \t]*\(?([A-J])[.)][ \t]+(.*)$", re.MULTILINE)
SHOT = re.compile(r"^[ \t]*(?:Q|Question|Input|Example)[ \t]*\d*[ \t]*:", re.MULTILINE | re.IGNORECASE)
CORRECTION = re.compile(
    r"^\W*(?:no\b|wrong|incorrect|that'?s (?:not|wrong)|try again|still (?:not|wrong|fails)|doesn'?t work|again)",
    re.IGNORECASE,
)
