"""What counts as unusual: words and shapes that training did not have, not what its tables could not hold."""

from dataclasses import replace

import numpy as np

from router_models.features import extract
from router_models.novelty import fit_novelty
from router_models.prompt import Prompt, Turn

_SUBJECTS = ("river", "king", "treaty", "mountain", "harbour", "priest", "market", "bridge")
_QUESTIONS = [
    f"In which year was the {a} by the {b} first named in {number * 7 + 900} documents, and why?"
    for number, (a, b) in enumerate((a, b) for a in _SUBJECTS for b in _SUBJECTS for _ in range(3))
]
_PROMPTS = [Prompt.from_text(question) for question in _QUESTIONS]


def _mean_novelty(prompts: list[Prompt]) -> float:
    return float(np.mean(fit_novelty(extract(_PROMPTS), seed=0).of(extract(prompts))))


def test_usual_prompts_are_usual_and_others_are_not() -> None:
    code = [Prompt.from_text(f"def f{n}(x):\n    return [y**{n} for y in x if y % {n + 2} == 0]") for n in range(20)]
    assert _mean_novelty(_PROMPTS[:40]) < 0.8
    assert _mean_novelty(code) > 0.95


def test_what_single_prompts_never_have_makes_nothing_unusual() -> None:
    usual = _mean_novelty(_PROMPTS[:40])
    served = [replace(prompt, max_tokens=256, num_tools=2, response_format="json") for prompt in _PROMPTS[:40]]
    assert _mean_novelty(served) == usual
    talked = [replace(prompt, turns=(Turn("system", "Be brief."), *prompt.turns)) for prompt in _PROMPTS[:40]]
    assert _mean_novelty(talked) < usual + 0.2
