import numpy as np

from router_models.data import Group
from router_models.open_data import OPEN, licences, openly_licensed
from router_models.prompt import Prompt


def _group(source: str, *subsets: str) -> Group:
    ids = tuple(f"{source}-{i}" for i in range(len(subsets)))
    prompts = tuple(Prompt.from_text(name) for name in subsets)
    return Group(source, ids, prompts, np.array(subsets), ("a", "b"), np.zeros((len(subsets), 2)))


def test_what_is_not_listed_is_left_out() -> None:
    groups = [_group("somebody", "x"), _group("llmrouter", "trivia_qa", "arc_challenge")]
    assert openly_licensed(groups) == []


def test_subsets_are_chosen_by_how_their_names_start() -> None:
    (found,) = openly_licensed([_group("routerarena", "MMLUPro_law", "ArcMMLU", "MathQA", "Ethics_virtue", "MATH")])
    assert found.subset.tolist() == ["MMLUPro_law", "MathQA", "MATH"]
    assert found.ids == ("routerarena-0", "routerarena-2", "routerarena-4")


def test_a_whole_source_can_be_open() -> None:
    (found,) = openly_licensed([_group("mmlu_pro", "law", "")])
    assert len(found) == 2


def test_licences_are_counted_by_prompt() -> None:
    groups = openly_licensed([_group("llmrouter", "mbpp", "gsm8k", "math"), _group("mmlu_pro", "law")])
    assert licences(groups) == {"CC-BY-4.0": 1, "MIT": 3}


def test_only_permissive_licences_are_listed() -> None:
    assert {licence for parts in OPEN.values() for licence in parts.values()} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
