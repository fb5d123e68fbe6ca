import numpy as np
import pytest
from pydantic import ValidationError

from router_models.errors import PolicyError
from router_models.policy import (
    Candidate,
    Decision,
    PolicyConfig,
    PriceGoal,
    ShareGoal,
    Situation,
    decide,
    threshold_at,
)

_CHEAP, _MIDDLE, _DEAR = (
    Candidate("cheap", 0.001, 0.5),
    Candidate("middle", 0.004, 0.72),
    Candidate("dear", 0.02, 0.8),
)
_FLEET = (_CHEAP, _MIDDLE, _DEAR)
_PLAIN = PolicyConfig(goal=ShareGoal(strong_share=0.5), exploration=0.0)


def _decide(policy: PolicyConfig = _PLAIN, fleet: tuple[Candidate, ...] = _FLEET, **situation: object) -> Decision:
    defaults = {"num_tokens": 100, "threshold": 0.1}
    return decide(policy, fleet, Situation(**(defaults | situation)), draw=0.0)  # type: ignore[arg-type]


def test_the_cheapest_model_that_is_good_enough_answers() -> None:
    found = _decide()
    assert found.model == "middle"
    assert found.good_enough == pytest.approx({"cheap": 0.7, "middle": 0.92, "dear": 1.0})
    assert _decide(threshold=0.4).model == "cheap"
    assert _decide(threshold=0.01).model == "dear"


def test_a_better_and_cheaper_model_is_always_good_enough() -> None:
    assert _decide(fleet=(Candidate("small", 0.001, 0.9), _DEAR), threshold=0.0).model == "small"


def test_the_routers_need_counts_for_more_than_the_probabilities() -> None:
    pair = (_CHEAP, _DEAR)
    assert _decide(fleet=pair, threshold=0.2).model == "dear"
    assert _decide(fleet=pair, threshold=0.2, need=0.1).model == "cheap"
    assert _decide(need=0.4).good_enough == pytest.approx({"cheap": 0.6, "middle": 0.82, "dear": 1.0})


def test_the_price_goal_weighs_what_is_lost_against_what_is_saved() -> None:
    def of(regret: float) -> str:
        return _decide(PolicyConfig(goal=PriceGoal(regret_usd=regret), exploration=0.0), threshold=None).model

    assert [of(regret) for regret in (0.03, 0.15, 1.0)] == ["cheap", "middle", "dear"]


@pytest.mark.parametrize("goal", [ShareGoal(strong_share=0.3), PriceGoal(regret_usd=0.1)])
def test_turning_the_dial_up_never_gives_a_cheaper_model(goal: ShareGoal | PriceGoal) -> None:
    policy = PolicyConfig(goal=goal, exploration=0.0)
    costs = {candidate.model: candidate.cost_usd for candidate in _FLEET}
    chosen = [costs[_decide(policy, quality=float(q)).model] for q in np.linspace(0, 1, 41)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (_CHEAP.cost_usd, _DEAR.cost_usd)


def test_the_middle_of_the_dial_is_the_operators_threshold() -> None:
    assert threshold_at(0.13, 0.5) == 0.13


def test_an_abstention_goes_to_the_dearest_unless_the_caller_wants_the_cheapest() -> None:
    found = _decide(abstains=True)
    assert (found.model, found.mechanism) == ("dear", "abstained")
    assert _decide(abstains=True, quality=0.0).model == "cheap"


def test_no_prompt_gets_below_the_tenants_floor() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, floors={"bank": "middle"}, exploration=0.5)
    sure = (Candidate("cheap", 0.001, 1.0), _MIDDLE, _DEAR)
    for draw in np.linspace(0, 0.999, 50):
        found = decide(policy, sure, Situation(10, tenant="bank", quality=0.0, threshold=1.0), float(draw))
        assert found.model != "cheap"
        assert found.refused == {"cheap": "below the tenant's floor"}
    assert _decide(policy, sure).model == "cheap"


def test_models_that_are_down_or_too_small_are_no_candidates() -> None:
    fleet = (Candidate("cheap", 0.001, 0.9, max_context=50), Candidate("middle", 0.004, 0.9, is_up=False), _DEAR)
    found = _decide(fleet=fleet)
    assert (found.model, found.mechanism) == ("dear", "only")
    assert found.refused == {"cheap": "context window", "middle": "down"}


def test_no_candidate_left_is_an_error_that_names_the_reasons() -> None:
    with pytest.raises(PolicyError, match="middle: down"):
        _decide(fleet=(Candidate("middle", 1.0, 0.5, is_up=False),))


def test_only_a_tenant_that_agreed_steps_down_when_the_fleet_is_full() -> None:
    fleet = (_CHEAP, _MIDDLE, Candidate("dear", 0.02, 0.8, is_saturated=True))
    policy = PolicyConfig(goal=_PLAIN.goal, step_down_tenants=("patient",), exploration=0.0)
    assert _decide(policy, fleet, threshold=-1.0).model == "dear"
    found = _decide(policy, fleet, threshold=-1.0, tenant="patient")
    assert (found.model, found.mechanism) == ("middle", "stepped_down")


def test_a_conversation_goes_up_at_once_and_down_slowly() -> None:
    up = _decide(current="cheap")
    assert (up.model, up.mechanism) == ("middle", "model")
    first = _decide(current="dear")
    assert (first.model, first.mechanism, first.turns_below) == ("dear", "held", 1)
    second = _decide(current="dear", turns_below=first.turns_below)
    assert (second.model, second.turns_below) == ("middle", 0)


def test_a_small_gain_does_not_change_a_conversations_model() -> None:
    fleet = (Candidate("cheap", 0.001, 0.78), _DEAR)
    assert _decide(fleet=fleet, threshold=0.01).model == "dear"
    assert _decide(fleet=fleet, threshold=0.01, current="cheap").mechanism == "held"


def test_a_warm_prefix_that_costs_more_than_is_saved_holds_the_model() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, warm_token_usd=1e-5, exploration=0.0)
    warm = Candidate("dear", 0.02, 0.8, warm_tokens=5000)
    assert _decide(policy, (_CHEAP, _MIDDLE, warm), current="dear", turns_below=9).mechanism == "held"
    assert _decide(policy, _FLEET, current="dear", turns_below=9).model == "middle"


def test_exploration_takes_every_allowed_model_as_often_as_its_logged_propensity() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, exploration=0.3)
    draws = (np.arange(3000) + 0.5) / 3000
    found = [decide(policy, _FLEET, Situation(10, threshold=0.1), float(draw)) for draw in draws]
    for model, probability in found[0].probabilities.items():
        assert np.mean([f.model == model for f in found]) == pytest.approx(probability, abs=0.002)
    assert sum(found[0].probabilities.values()) == pytest.approx(1.0)
    assert all(f.propensity == f.probabilities[f.model] for f in found)
    assert {f.mechanism for f in found} == {"model", "explored"}


def test_models_of_unknown_ability_are_taken_only_as_the_last() -> None:
    fleet = (Candidate("new", 0.001, None), _DEAR)
    assert _decide(fleet=fleet).model == "dear"
    assert _decide(fleet=(Candidate("new", 0.001, None), Candidate("other", 1.0, None))).model == "other"


def test_a_share_needs_a_threshold_and_settings_are_checked() -> None:
    with pytest.raises(PolicyError, match="needs a threshold"):
        _decide(threshold=None)
    with pytest.raises(PolicyError, match="floor"):
        _decide(PolicyConfig(floors={"t": "absent"}), tenant="t")
    with pytest.raises(ValidationError):
        PolicyConfig.model_validate({"goal": {"kind": "share", "strong_share": 1.5}})


def test_a_floor_for_all_holds_for_tenants_without_one_of_their_own() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, floor="dear", floors={"cheap": "cheap"}, exploration=0.0)
    assert _decide(policy, threshold=9.0, tenant="anyone").model == "dear"
    assert _decide(policy, threshold=9.0, tenant="cheap").model == "cheap"


def test_a_full_model_that_was_not_wanted_anyway_steps_nobody_down() -> None:
    fleet = (_CHEAP, _MIDDLE, Candidate("dear", 0.02, 0.8, is_saturated=True))
    policy = PolicyConfig(goal=_PLAIN.goal, step_down_tenants=("patient",), exploration=0.0)
    found = _decide(policy, fleet, threshold=0.4, tenant="patient")
    assert (found.model, found.mechanism, found.refused) == ("cheap", "model", {})
    stepped = _decide(policy, fleet, threshold=-1.0, tenant="patient")
    assert (stepped.refused, set(stepped.probabilities)) == ({"dear": "saturated"}, {"cheap", "middle"})


def test_with_everybody_full_nobody_is_refused() -> None:
    fleet = tuple(Candidate(c.model, c.cost_usd, c.prob_right, is_saturated=True) for c in _FLEET)
    policy = PolicyConfig(goal=_PLAIN.goal, step_down_tenants=("patient",), exploration=0.0)
    assert _decide(policy, fleet, threshold=-1.0, tenant="patient").model == "dear"


def test_nobody_steps_down_below_the_floor() -> None:
    fleet = (_CHEAP, _MIDDLE, Candidate("dear", 0.02, 0.8, is_saturated=True))
    policy = PolicyConfig(goal=_PLAIN.goal, step_down_tenants=("t",), floors={"t": "dear"}, exploration=0.5)
    assert {decide(policy, fleet, Situation(1, "t", threshold=9.0), d).model for d in (0.0, 0.9)} == {"dear"}


def test_the_ends_of_the_dial_are_the_callers_word() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, exploration=0.4)
    for quality, model in ((0.0, "cheap"), (1.0, "dear")):
        found = decide(policy, _FLEET, Situation(9, quality=quality, threshold=0.1, current="middle"), draw=0.99)
        assert (found.model, found.propensity) == (model, 1.0)


def test_the_preferred_model_is_the_one_without_exploration() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, exploration=0.3)
    found = decide(policy, _FLEET, Situation(9, threshold=0.1), draw=0.99)
    assert (found.mechanism, found.preferred) == ("explored", _decide().model)


def test_an_abstention_asks_first_within_a_promised_share_and_has_it_elsewhere() -> None:
    sure = (Candidate("cheap", 0.001, 0.9), _DEAR)
    share = _decide(fleet=sure, threshold=0.5, abstains=True)
    assert (share.model, share.mechanism) == ("dear", "abstained")
    assert share.gap == pytest.approx(1.9)
    # The share is used up.
    assert _decide(fleet=sure, threshold=float("inf"), abstains=True).model == "cheap"
    price = PolicyConfig(goal=PriceGoal(regret_usd=1e-9), exploration=0.0)
    assert _decide(price, sure, threshold=None, abstains=True).model == "dear"


def test_the_gap_is_what_the_best_of_the_lesser_models_leaves() -> None:
    assert _decide().gap == pytest.approx(0.08)
    assert _decide(fleet=(_DEAR,)).gap is None


def test_the_need_is_that_of_all_candidates_where_the_cheapest_is_not_allowed() -> None:
    policy = PolicyConfig(goal=_PLAIN.goal, floor="middle", exploration=0.0)
    assert _decide(policy, need=0.4).good_enough == pytest.approx({"middle": 0.82, "dear": 1.0})


def test_each_candidate_may_count_tokens_its_own_way() -> None:
    fleet = (Candidate("cheap", 0.001, 0.9, max_context=50, num_tokens=40), _DEAR)
    assert _decide(fleet=fleet, threshold=9.0).model == "cheap"
    fleet = (Candidate("cheap", 0.001, 0.9, max_context=500, num_tokens=501), _DEAR)
    assert _decide(fleet=fleet, threshold=9.0).refused == {"cheap": "context window"}


def test_a_warm_prefix_raises_the_gain_that_pays_for_going_up() -> None:
    policy = PolicyConfig(goal=PriceGoal(regret_usd=0.15), warm_token_usd=1e-5, exploration=0.0)
    warm = Candidate("cheap", 0.001, 0.5, warm_tokens=5000)
    assert _decide(policy, (warm, _MIDDLE, _DEAR), threshold=None, current="cheap").mechanism == "held"
    assert _decide(policy, threshold=None, current="cheap").model == "middle"


def test_a_policy_that_was_edited_is_another_version() -> None:
    first, same, edited = (
        PolicyConfig(name="p", exploration=0.02),
        PolicyConfig(name="p", exploration=0.02),
        PolicyConfig(name="p", exploration=0.03),
    )
    assert first.version == same.version != edited.version
    assert first.version.startswith("p@")
