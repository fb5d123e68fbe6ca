import numpy as np
import pytest

from router_models.data import Group
from router_models.errors import DataError, UnknownModelError
from router_models.features import extract
from router_models.fit import random_folds
from router_models.held_out import evaluate_pair
from router_models.metrics import apgr_exact, expected_calibration_error
from router_models.prompt import Prompt
from router_models.router import Router, canonical_name
from router_models.train import Trained, train
from tests.router_models.tables import ABILITIES, world

_PAIR = ("acme/Strong-1_5", "weak")


def _apgr(router: Router, group: Group, pair: tuple[str, str] = _PAIR) -> float:
    found = router.predict(group.prompts, router.candidates(pair, group.source))
    return apgr_exact(found.need, group.pair(*pair))


def test_a_router_orders_new_prompts_by_what_it_learnt(trained: Trained) -> None:
    assert _apgr(trained.router, world(1500, seed=9)) > 0.64
    assert _apgr(trained.router, world(1500, seed=9, source="other")) > 0.64


def test_probabilities_are_calibrated_on_new_prompts(trained: Trained) -> None:
    group = world(3000, seed=9)
    found = trained.router.predict(group.prompts, trained.router.candidates(group.models, "world"))
    for i, model in enumerate(group.models):
        # Five hundred labels of nearly certain results; thousands of noisy ones, as the shipped router has, get half.
        assert expected_calibration_error(found.prob_right[:, i], group.of(model)) < 0.1, model


def test_one_prompt_is_scored_as_in_a_batch(trained: Trained) -> None:
    group, router = world(5, seed=9), trained.router
    choices = router.candidates(_PAIR, "world")
    batch = router.predict(group.prompts, choices)
    for i, prompt in enumerate(group.prompts):
        single = router.predict([prompt], choices)
        np.testing.assert_allclose(single.prob_right[0], batch.prob_right[i], rtol=1e-4)
        assert single.novelty[0] == pytest.approx(batch.novelty[i], abs=0.011)


def test_equal_data_and_seed_give_an_equal_router(trained: Trained) -> None:
    again = train(trained.groups, seed=3)
    prompts = world(20, seed=9).prompts
    found = [t.router.predict(prompts, t.router.candidates(_PAIR, "world")).need for t in (trained, again)]
    assert (found[0] == found[1]).all()


def test_shuffled_labels_teach_nothing() -> None:
    group = world(500, seed=1)
    order = np.random.default_rng(0).permutation(len(group))
    shuffled = Group(group.source, group.ids, group.prompts, group.subset, group.models, group.results[order])
    test = world(1500, seed=9)
    assert _apgr(train([shuffled]).router, test) < _apgr(train([group]).router, test) - 0.12


def test_a_new_model_needs_few_labels_beside_known_ones() -> None:
    group = world(600, seed=1)
    group.results[150:, group.models.index("weak")] = np.nan
    router = train([group]).router
    assert _apgr(router, world(1500, seed=9)) > 0.62
    ability = next(e.abilities["weak"] for e in router.experts)
    assert ability.num_labels == 150


def test_logs_with_one_answer_a_request_are_enough() -> None:
    group = world(900, seed=1)
    taken = np.random.default_rng(0).integers(len(group.models), size=len(group))
    group.results[np.arange(len(group.models)) != taken[:, None]] = np.nan
    assert _apgr(train([group]).router, world(1500, seed=9)) > 0.62


def test_logs_with_one_answer_a_request_may_name_domains() -> None:
    """A model may answer in one domain alone, and all of that one is held out at times."""
    group = world(300, seed=1, models=("acme/Strong-1_5", "weak"))
    subset = np.array([f"{name} {i % 3}" for i, name in enumerate(group.subset)])
    strong = subset == "algebra 0"
    group.results[~strong, 0], group.results[strong, 1] = np.nan, np.nan
    named = Group(group.source, group.ids, group.prompts, subset, group.models, group.results)
    (expert,) = train([named], fold_of=lambda *_: np.unique(subset, return_inverse=True)[1] % 5).router.experts
    assert expert.lean == 1.0
    assert expert.abilities["acme/Strong-1_5"].num_labels == strong.sum()


def test_prompts_unlike_the_training_are_noticed(trained: Trained) -> None:
    router = trained.router
    choices = router.candidates(_PAIR, "world")
    usual = router.predict(world(300, seed=9).prompts, choices)
    code = Prompt.from_text("```python\n" + "def f(x):\n    return {x: [1, 2, 3]}\n" * 30 + "```\nПочему?")
    assert usual.abstains.mean() < 0.15
    assert router.predict([code], choices).abstains.all()


def test_far_from_the_training_the_order_leans_towards_length(trained: Trained) -> None:
    router = trained.router
    strange = [Prompt.from_text("ξ ψ ω\n" * count) for count in (100, 400, 1000)]
    found = router.predict(strange, router.candidates(_PAIR, "world"))
    assert (found.novelty > 0.99).all()
    assert found.need[2] >= found.need[0]


def test_a_second_layer_learns_another_traffic_on_top_of_the_first(trained: Trained) -> None:
    own = world(200, seed=5, source="mine", models=_PAIR)
    found = train([own], base=trained.router)
    assert found.used_base
    assert [len(layer) for layer in found.router.layers] == [2, 1]
    test = world(1500, seed=9, source="mine")
    assert _apgr(found.router, test) > _apgr(train([own]).router, test) - 0.02
    prompts = test.prompts[:50]
    before, after = (r.predict(prompts, r.candidates(_PAIR, "world")).need for r in (trained.router, found.router))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-5)


def test_what_the_first_layer_thinks_of_models_is_linear_in_its_signals(trained: Trained) -> None:
    router, group = trained.router, world(20, seed=9)
    features = extract(group.prompts)
    said = router.log_odds(["tiny", "strong-1.5", "nobody"], "nowhere").predict(router.signals(features))
    tiny = router.predict(features, router.candidates(["tiny"])).prob_right[:, 0]
    np.testing.assert_allclose(1 / (1 + np.exp(-said[:, 0])), tiny, rtol=1e-3)
    # Both sources know the strong model, but only one of them the tiny one beside it.
    strong = router.predict(features, router.candidates(["strong-1.5"], "world")).prob_right[:, 0]
    np.testing.assert_allclose(1 / (1 + np.exp(-said[:, 1])), strong, rtol=1e-3)
    assert said[:, 0].mean() < said[:, 2].mean() < said[:, 1].mean()


@pytest.mark.parametrize("seed", [20, 21])
def test_a_few_labels_do_not_undo_what_the_first_layer_knows(trained: Trained, seed: int) -> None:
    own, test = world(40, seed=seed, source="mine", models=_PAIR), world(1500, seed=9, source="mine")

    def of_gap(router: Router) -> float:
        prob_right = router.predict(test.prompts, router.candidates(_PAIR, "mine")).prob_right
        return apgr_exact(prob_right[:, 0] - prob_right[:, 1], test.pair(*_PAIR))

    assert of_gap(train([own], base=trained.router).router) > of_gap(trained.router) - 0.03


def test_traffic_of_another_source_is_taken_for_unknown_and_its_own_labels_teach_it(trained: Trained) -> None:
    test = world(1500, seed=9, source="mine", models=_PAIR)
    scores = []
    for count in (60, 600):
        own = world(count, seed=5, source="mine", models=_PAIR)
        router = train([own], base=trained.router).router
        choices = router.candidates(_PAIR, "mine")
        assert all(model.is_own for models in choices for model in models)
        scores.append(apgr_exact(router.predict(test.prompts, choices).need, test.pair(*_PAIR)))
    assert scores[0] > 0.55
    assert scores[1] > 0.64


def test_a_domain_taken_for_unknown_is_ordered_by_length(trained: Trained) -> None:
    router, group = trained.router, world(300, seed=9)
    found = router.predict(group.prompts, router.candidates(_PAIR, "nowhere"))
    lengths = np.array([len(prompt.text) for prompt in group.prompts])
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(found.adapted(1.0).need[order]) >= -1e-9).all()
    assert apgr_exact(found.need, group.pair(*_PAIR)) > 0.6


def test_a_base_that_has_seen_the_prompts_is_left_out(trained: Trained) -> None:
    assert not train([world(100, seed=1)], base=trained.router).used_base


def test_names_match_across_spellings_and_unknown_ones_are_refused(trained: Trained) -> None:
    assert canonical_name("meta-llama/Meta-Llama-3_1-8B-Instruct") == canonical_name("llama-3.1-8b-instruct")
    router = trained.router
    assert len(router.candidates(["strong-1.5", "weak"], "nowhere")) == 2
    assert len(router.candidates(["strong-1.5", "weak"], "other")) == 1
    with pytest.raises(UnknownModelError, match="gpt-9"):
        router.candidates(["gpt-9", "weak"])


def test_typical_models_stand_in_for_unknown_ones(trained: Trained) -> None:
    group = world(1500, seed=9)
    found = trained.router.predict(group.prompts, trained.router.stand_ins())
    assert apgr_exact(found.need, group.pair(*_PAIR)) > 0.6


def test_features_and_folds_can_be_given_and_progress_is_told() -> None:
    group, told = world(60, seed=1), []
    found = train(
        [group],
        features=[extract(group.prompts)],
        progress=lambda stage, done, total: told.append((done, total)),
        fold_of=lambda given, seed: np.unique(given.subset, return_inverse=True)[1],
    )
    assert told[-1] == (2, 2)
    assert len(np.unique(found.folds[0])) == 4


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(DataError, match="30 are needed"):
        train([world(10)])
    with pytest.raises(DataError, match="nothing"):
        train([])
    group = world(36, models=tuple(ABILITIES))
    group.results[np.arange(4) != np.arange(36)[:, None] % 4] = np.nan
    with pytest.raises(DataError, match="no model with 10"):
        train([group])


def test_a_model_with_one_label_is_learnt_beside_others() -> None:
    group = world(60, seed=1, models=("acme/Strong-1_5", "tiny", "weak"))
    group.results[1:, 1] = np.nan
    assert train([group]).router.experts[0].abilities["tiny"].num_labels == 1


def test_a_prompt_that_is_asked_again_is_held_out_with_itself() -> None:
    """Nothing can be known of these prompts, but for what was answered the other times."""
    group, rng = world(60, seed=1), np.random.default_rng(0)
    group.results[:] = rng.random(group.results.shape) < [0.9, 0.6, 0.5, 0.3]
    again = group.take(np.tile(np.arange(60), 5))
    assert all(len(set(fold)) == 1 for fold in random_folds(again, 0).reshape(5, 60).T)
    trained = train([again])
    assert apgr_exact(evaluate_pair(trained, "world", _PAIR)[1].need, again.pair(*_PAIR)) < 0.6
