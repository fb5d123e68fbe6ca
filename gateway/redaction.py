"""Takes out of a text what looks like personal data or a secret. What it cannot recognise stays: names, for example.

Every kind leaves a word in brackets, so that a router trained on the log still sees that something was there.
"""

from __future__ import annotations

import re

# In this order: what is longer and surer first, since what it leaves is not looked at again.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "private key",
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    ),
    ("token", re.compile(r"(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*")),
    (
        "secret",
        re.compile(
            r"\b(?:sk|pk|rk)[-_][\w-]{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
            r"|\bxox[abprs]-[\w-]{10,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bhf_\w{20,}"
        ),
    ),
    ("secret", re.compile(r"(?i)(?<=bearer )[\w.~+/-]{16,}=*")),
    (
        "secret",
        re.compile(
            r"(?i)(?:(?<=password)|(?<=passwd)|(?<=secret)|(?<=api_key)|(?<=api-key)|(?<=apikey))['\"]?\s*[:=]\s*\S+"
        ),
    ),
    ("login", re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")),
    ("email", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,8}")),
    ("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")),
    ("ip address", re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b|\b(?:[0-9a-fA-F]{1,4}:){4,7}[0-9a-fA-F]{1,4}\b")),
    ("social security number", re.compile(r"\b\d{3}-\d{2}-\d{4}\b")),
)
_CARD = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")
# With a country code or with separators: a plain number is more often a number than a telephone.
_PHONE = re.compile(r"\+\d(?:[ ().-]{0,2}\d){7,14}\b|(?<!\d)\(?\d{3,4}\)?[ .-]\d{3,4}[ .-]\d{3,4}\b")


def redact(text: str) -> str:
    """The text with a word like [email] in place of each."""
    for name, pattern in _PATTERNS:
        text = pattern.sub(f"[{name}]", text)
    text = _CARD.sub(lambda found: "[card number]" if _is_card(found.group()) else found.group(), text)
    return _PHONE.sub("[telephone number]", text)


def _is_card(text: str) -> bool:
    """Luhn's check, which one other number in ten passes."""
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    doubled = [digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4) for place, digit in enumerate(digits)]
    return sum(doubled) % 10 == 0
