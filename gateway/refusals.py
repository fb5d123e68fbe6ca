"""From pydantic's validation errors to refusals that name the offending field in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from gateway.errors import BadRequestError

# Characters of a caller's own words that a message repeats.
_MAX_ECHO = 100


def explained(error: ValidationError, body: bytes) -> BadRequestError:
    """The refusal of a body that is no valid request: it names the first offending field."""
    details = error.errors(include_url=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return BadRequestError(f"The request body is not valid JSON: {details[0]['ctx']['error']}.")
    raw = json.loads(body)
    # A union reports every member's failure; the one that got deepest into the input is the one that was meant.
    paths = [_path(detail["loc"], raw, missing=detail["type"] == "missing") for detail in details]
    # Of the equally deep, one that liked the type was meant.
    ranks = [(len(path), not detail["type"].endswith("_type")) for path, detail in zip(paths, details, strict=True)]
    best = ranks.index(max(ranks))
    return _bad_field(_render(paths[best]), details[best]["type"], details[best]["msg"])


def out_of_range(error: ValidationError, renamed: Mapping[str, str]) -> BadRequestError:
    """The refusal of a parameter out of its range; `renamed` has the request's own name of it, where it differs."""
    detail = error.errors(include_url=False, include_input=False)[0]
    name = str(detail["loc"][0])
    return _bad_field(renamed.get(name, name), detail["type"], detail["msg"])


def shortened(text: str) -> str:
    """A caller's own words, fit to be repeated."""
    return text if len(text) <= _MAX_ECHO else text[:_MAX_ECHO] + "..."


def _path(loc: Sequence[int | str], raw: object, missing: bool) -> list[int | str]:
    """`loc` without the union tags that pydantic puts between the keys of the input."""
    path: list[int | str] = []
    for place, part in enumerate(loc):
        if _has(raw, part):
            path.append(part)
            raw = raw[part]  # type: ignore[index]  # just checked
        elif missing and place == len(loc) - 1:
            path.append(part)
    return path


def _has(raw: object, part: int | str) -> bool:
    if isinstance(raw, list):
        return isinstance(part, int) and part < len(raw)
    return isinstance(raw, dict) and part in raw


def _render(path: Sequence[int | str]) -> str | None:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{shortened(part)}" for part in path)
    return text.lstrip(".") or None


def _bad_field(param: str | None, kind: str, message: str) -> BadRequestError:
    message = message.removeprefix("Value error, ").replace("Tuple should", "The list should")
    if param is None:
        return BadRequestError(f"Invalid request: {message}.", param=_quoted_name(message))
    if kind == "extra_forbidden":
        return BadRequestError(f"Unrecognized request argument: `{param}`.", param=param, code="unknown_parameter")
    if kind == "missing":
        return BadRequestError(f"Missing required parameter: `{param}`.", param, "missing_required_parameter")
    code = "unsupported_parameter" if "not supported" in message else "invalid_value"
    return BadRequestError(f"Invalid value for `{param}`: {message}.", param=param, code=code)


def _quoted_name(message: str) -> str | None:
    """The first name in backquotes: rules over several fields name the offender so."""
    return message.split("`")[1] if message.count("`") >= 2 else None
