import numpy as np
import pytest

from router_models.data import Group
from router_models.factors import factors
from router_models.features import extract
from router_models.prompt import Prompt
from router_models.reach import fit_lean
from router_models.text import inverse_document_frequency, weigh

_NUM_SUBSETS = 10


def _group(shared: bool, seed: int = 0, num_subsets: int = _NUM_SUBSETS) -> Group:
    """Hard prompts say "proof". If it is not `shared`, half of the subsets say it of their easy ones.

    Longer prompts are a little harder everywhere.
    """
    rng = np.random.default_rng(seed)
    prompts, subset, results = [], [], []
    for i in range(800):
        number, is_hard, length = i % num_subsets, rng.random() < 0.5, int(rng.integers(1, 40))
        says = is_hard if shared or number % 2 else not is_hard
        body = " ".join(rng.choice(["apple", "pear", "plum", "fig"], size=length))
        prompts.append(Prompt.from_text(f"{'proof' if says else 'story'} about task{number} {body}"))
        subset.append(f"s{number}")
        weak = float(rng.random() < (0.2 if is_hard else 0.8) - (0.0 if shared else 0.25 * (length - 20) / 20))
        results.append([1.0, weak])
    ids = tuple(map(str, range(len(prompts))))
    return Group("x", ids, tuple(prompts), np.array(subset), ("strong", "weak"), np.array(results))


def _tasks() -> Group:
    """Subsets with words of their own, the harder the longer their prompts; in each, "proof" says a little."""
    rng = np.random.default_rng(0)
    prompts, subset, results = [], [], []
    for i in range(800):
        number, says = i % _NUM_SUBSETS, rng.random() < 0.5
        size = 20 + 5 * number + int(rng.integers(0, 8))
        words = rng.choice([f"word{number}{letter}" for letter in "abcdefgh"], size=size)
        prompts.append(Prompt.from_text(f"{'proof' if says else 'story'} {' '.join(words)}"))
        subset.append(f"s{number}")
        results.append([1.0, float(rng.random() < 0.8 - 0.6 * number / (_NUM_SUBSETS - 1) - (0.07 if says else -0.07))])
    ids = tuple(map(str, range(len(prompts))))
    return Group("x", ids, tuple(prompts), np.array(subset), ("strong", "weak"), np.array(results))


def _lean(group: Group, seed: int = 0) -> float:
    features = extract(group.prompts)
    tfidf = weigh(features.counts, inverse_document_frequency(features.counts))
    return fit_lean(group, tfidf, features.structure, factors(group.results), seed)


def test_what_holds_of_every_subset_reaches_to_new_ones() -> None:
    assert _lean(_group(shared=True)) <= 0.25


def test_what_holds_of_some_subsets_does_not() -> None:
    assert _lean(_group(shared=False)) >= 0.75


@pytest.mark.parametrize("seed", range(4))
def test_unknown_tasks_are_ordered_among_each_other_too(seed: int) -> None:
    """Whichever of them happen to be left out together."""
    assert _lean(_tasks(), seed) == 1.0


def test_with_too_few_subsets_nothing_is_known() -> None:
    assert _lean(_group(shared=True, num_subsets=2)) == 1.0


def test_unknown_results_are_passed_over() -> None:
    group = _group(shared=True)
    group.results[::3, 0] = np.nan
    assert _lean(group) <= 0.25


def test_models_that_do_not_differ_teach_nothing() -> None:
    group = _group(shared=True)
    group.results[:, 1] = group.results[:, 0]
    assert _lean(group) == pytest.approx(1.0)


def test_between_models_that_are_equal_nothing_is_known() -> None:
    group = _group(shared=True)
    group.results[:, 0] = group.results[:, 1]
    group.results[np.flatnonzero(group.results[:, 1] == 0)[0], 0] = 0.5
    assert _lean(group) == 1.0


def test_where_nobody_answered_the_same_prompts_nothing_is_known() -> None:
    group = _group(shared=True)
    group.results[::2, 0], group.results[1::2, 1] = np.nan, np.nan
    assert _lean(group) == 1.0
