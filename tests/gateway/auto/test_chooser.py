"""Decisions of the gateway over a router that says what a test wants: the request's text is its score."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engines.types import ModelCard
from gateway.auto.choice import Choice
from gateway.auto.chooser import AutoChooser
from gateway.auto.fleet_health import FleetHealth
from gateway.auto.live_router import LiveRouter
from gateway.auto.router_watch import Active, RouterWatch
from gateway.auto.threshold import FixedThreshold, ShareThreshold, Threshold
from gateway.auto_config import AutoConfig
from gateway.fleet import Fleet
from gateway.log import make_logger
from gateway.openai import ChatCompletionRequest
from gateway.router_metrics import RouterMetrics
from router_models.online_quantile import OnlineQuantile
from router_models.prompt import Prompt
from router_models.scorer import Score
from tests.gateway.auto_world import STRONG, WEAK, auto_config, settings
from tests.gateway.fakes import ScriptedEngine, echo_engine

_CARD = ModelCard(model="fake", prompt_kinds=frozenset({"tokens"}), fingerprint="f" * 64, max_model_len=100_000)
_PRICE = {"goal": {"kind": "price", "regret_usd": 0.05}}


class _SaysWhatItReads:
    """The last message is the need of the strong model; with a "?" behind it, the router does not trust itself."""

    version, feature_version = "0123456789ab", 1

    def score(self, prompt: Prompt) -> Score:
        said = prompt.last_user_text
        time.sleep(0.02 if said == "0.00" else 0.0)
        if said == "broken":
            raise IndexError(said)
        need = float(said.rstrip("?"))
        # Of a domain that it does not know it would say that nobody needs much.
        return Score((0.9 - need, 0.9), need, need / 10, 1.0 if said.endswith("?") else 0.1, said.endswith("?"), None)  # type: ignore[arg-type]


class _Watch:
    """Serves that router, or none."""

    def __init__(self, threshold: Threshold | None) -> None:
        router = cast(LiveRouter, _SaysWhatItReads())
        self.active = None if threshold is None else Active(router, threshold, STRONG)


@contextlib.asynccontextmanager
async def _chooser(
    config: AutoConfig, threshold: Threshold | None = None, draw: float = 0.0, has_router: bool = True
) -> AsyncIterator[AutoChooser]:
    engines = {WEAK: ScriptedEngine(card=_CARD), STRONG: ScriptedEngine(card=_CARD), "echo": echo_engine()}
    fleet = Fleet(settings(config.model_dump()), engines)
    fleet.start()
    await fleet.started()
    watch = _Watch((threshold or FixedThreshold(None)) if has_router else None)
    health = FleetHealth(fleet, {WEAK: 8, STRONG: 8}, 1.0, 1.0)
    metrics = RouterMetrics("test", CollectorRegistry())
    chooser = AutoChooser(config, fleet, health, cast(RouterWatch, watch), metrics, make_logger("error"), lambda: draw)
    yield chooser
    await chooser.close()


def _request(*said: str, **fields: object) -> ChatCompletionRequest:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": words} for i, words in enumerate(said))
    return ChatCompletionRequest.model_validate({"model": "auto", "messages": messages} | fields)


async def _talk(chooser: AutoChooser, *needs: str, num_tokens: int = 0, **fields: object) -> list[Choice]:
    """One conversation, turn by turn."""
    said: list[str] = []
    choices = []
    for need in needs:
        choices.append(await chooser.choose(_request(*said, need, **fields)))
        chooser.answered(choices[-1], num_tokens)
        said += [need, "answer"]
    return choices


def _models(choices: list[Choice]) -> list[str]:
    return [choice.model.name for choice in choices]


async def test_a_conversation_goes_up_at_once_and_down_after_some_turns() -> None:
    async with _chooser(auto_config("default", _PRICE | {"step_down_patience": 3})) as chooser:
        choices = await _talk(chooser, "0.0", "0.9", "0.0", "0.0", "0.0", "0.0")
    assert _models(choices) == [WEAK, STRONG, STRONG, STRONG, WEAK, WEAK]
    assert [choice.mechanism for choice in choices] == ["model", "model", "held", "held", "model", "model"]
    assert [choice.situation.turns_below for choice in choices] == [0, 0, 0, 1, 2, 0]


async def test_one_hard_turn_between_begins_the_patience_anew() -> None:
    async with _chooser(auto_config("default", _PRICE | {"step_down_patience": 2})) as chooser:
        choices = await _talk(chooser, "0.9", "0.0", "0.9", "0.0", "0.0")
    assert _models(choices) == [STRONG, STRONG, STRONG, STRONG, WEAK]


async def test_a_warm_prefix_holds_a_conversation_that_would_save_less() -> None:
    policy = _PRICE | {"step_down_patience": 1, "warm_token_usd": 1e-4}
    async with _chooser(auto_config("default", policy)) as chooser:
        assert _models(await _talk(chooser, "0.9", "0.0", num_tokens=5000)) == [STRONG, STRONG]
        cold = await _talk(chooser, "0.8", "0.0", num_tokens=0)
    assert _models(cold) == [STRONG, WEAK]


async def test_other_conversations_and_tenants_are_not_held() -> None:
    async with _chooser(auto_config("default", _PRICE)) as chooser:
        await _talk(chooser, "0.9")
        found = await chooser.choose(_request("0.9", "answer", "0.0"))
        assert (found.model.name, found.situation.current) == (STRONG, STRONG)
        other = await chooser.choose(_request("0.9", "answer", "0.0", cache_salt="bank"))
        assert (other.model.name, other.situation.current) == (WEAK, None)


async def test_a_dial_at_its_end_is_not_held() -> None:
    async with _chooser(auto_config("default", _PRICE)) as chooser:
        assert _models(await _talk(chooser, "0.9", "0.9", quality=0.0)) == [WEAK, WEAK]
        await _talk(chooser, "0.7")
        assert (await chooser.choose(_request("0.7", "answer", "0.0", quality=0.0))).model.name == WEAK


async def test_what_is_explored_does_not_become_the_conversations_model() -> None:
    async with _chooser(auto_config("default", _PRICE | {"exploration": 0.2}), draw=0.95) as chooser:
        choices = await _talk(chooser, "0.9", "0.9")
    assert _models(choices) == [WEAK, WEAK]
    assert [choice.mechanism for choice in choices] == ["explored", "explored"]
    assert choices[1].situation.current == STRONG


async def test_explaining_changes_nothing() -> None:
    quantile = OnlineQuantile(0.5, [0.1, 0.2, 0.3, 0.4])
    async with _chooser(auto_config("default"), ShareThreshold(quantile), draw=0.999) as chooser:
        first = await chooser.explain(_request("0.35"))
        for _ in range(20):
            await chooser.explain(_request("0.9"))
        again = await chooser.explain(_request("0.35"))
        later = await chooser.explain(_request("0.9", "answer", "0.35"))
    assert first.decision == again.decision
    assert (later.situation.current, quantile.owed) == (None, 0.0)


async def test_an_explanation_is_what_would_be_chosen() -> None:
    async with _chooser(auto_config("default", _PRICE)) as chooser:
        explained = await chooser.explain(_request("0.9"))
        assert (await chooser.choose(_request("0.9"))).decision == explained.decision


async def test_new_traffic_does_not_break_the_promised_share() -> None:
    quantile = OnlineQuantile(0.2, list(np.linspace(0, 0.5, 100)))
    async with _chooser(auto_config("default"), ShareThreshold(quantile)) as chooser:
        rng = np.random.default_rng(0)
        needs = [f"{need:.3f}?" for need in rng.random(800)]
        found = [(await chooser.choose(_request(need))).model.name == STRONG for need in needs]
    # The drift moves all needs while it is being noticed; what was missed then is made up for.
    assert abs(np.mean(found) - 0.2) <= 0.02


async def test_a_bound_is_held_against_needs_as_they_were_calibrated() -> None:
    """However strange the traffic is: what is not understood goes to the strong model anyway."""
    bound = {"goal": {"kind": "bound", "max_quality_loss": 0.05}, "exploration": 0.0}
    config = auto_config("default", bound, calibration="/nowhere")
    async with _chooser(config, FixedThreshold(0.3)) as chooser:
        for _ in range(400):
            await chooser.choose(_request("0.8?"))
        choice = await chooser.choose(_request("0.8"))
    assert choice.score is not None
    assert choice.score.need == 0.8


async def test_within_the_share_a_request_that_is_not_understood_comes_first() -> None:
    quantile = OnlineQuantile(0.3, list(np.linspace(0, 1, 100)))
    async with _chooser(auto_config("default"), ShareThreshold(quantile)) as chooser:
        rng = np.random.default_rng(0)
        needs = [f"{need:.3f}" + "?" * (i % 4 == 0) for i, need in enumerate(rng.random(400))]
        choices = [await chooser.choose(_request(need)) for need in needs]
    strange = [choice.model.name == STRONG for choice in choices[100::4]]
    assert np.mean(strange) > 0.95
    assert abs(np.mean([choice.model.name == STRONG for choice in choices]) - 0.3) <= 0.02
    assert {choice.mechanism for choice in choices[100::4] if choice.model.name == STRONG} == {"abstained"}


async def test_traffic_that_is_unknown_through_and_through_is_judged_as_such() -> None:
    async with _chooser(auto_config("default", _PRICE)) as chooser:
        first = await chooser.choose(_request("0.8"))
        for _ in range(1000):
            await chooser.choose(_request("0.8?"))
        last = await chooser.choose(_request("0.8"))
    assert (first.model.name, last.model.name) == (STRONG, WEAK)
    assert first.score is not None
    assert last.score is not None
    assert (first.score.need, round(last.score.need, 2)) == (0.8, 0.08)


async def test_without_a_router_the_strongest_answers_unless_the_caller_wants_the_cheapest() -> None:
    async with _chooser(auto_config("default"), has_router=False) as chooser:
        found = await chooser.choose(_request("anything"))
        assert (found.model.name, found.mechanism, found.artifact) == (STRONG, "fallback", None)
        assert (await chooser.choose(_request("anything", quality=0.0))).model.name == WEAK


async def test_a_router_with_too_much_to_do_leaves_the_rest_to_the_strongest() -> None:
    async with _chooser(auto_config("default", _PRICE)) as chooser:
        choices = await asyncio.gather(*(chooser.choose(_request("0.00")) for _ in range(40)))
        assert (await chooser.choose(_request("0.0"))).mechanism == "model"
    mechanisms = [choice.mechanism for choice in choices]
    assert (mechanisms.count("model"), mechanisms.count("fallback")) == (16, 24)


async def test_a_router_that_fails_fails_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    async with _chooser(auto_config("default", _PRICE)) as chooser:
        found = await chooser.choose(_request("broken"))
    assert (found.model.name, found.mechanism) == (STRONG, "fallback")
    assert "IndexError" in capsys.readouterr().err


async def test_a_receipt_has_all_that_decided() -> None:
    config = auto_config("default", _PRICE | {"floors": {"bank": WEAK}, "name": "mine"})
    async with _chooser(config) as chooser:
        told = (await _talk(chooser, "0.5", cache_salt="bank", max_tokens=100))[0].receipt(config)
    assert (told["asked"], told["chosen"], told["reason"], told["preferred"]) == ("auto", STRONG, "model", STRONG)
    assert (told["policy"], told["artifact"], told["floor"]) == (config.policy.version, "0123456789ab", WEAK)
    assert (told["propensity"], told["quality"], told["threshold"], told["abstains"]) == (1.0, 0.5, None, False)
    assert (told["strong_win_prob"], told["novelty"], told["conversation"]) == (0.5, 0.1, None)
    weak, strong = told["candidates"]  # type: ignore[misc]
    assert (weak["model"], weak["ability"], weak["prob_right"], weak["good_enough"]) == (WEAK, "weak", 0.4, 0.5)
    assert 0.5 < weak["bar"] < 1.0
    assert (strong["probability"], strong["refused"]) == (1.0, None)
    assert strong["cost_usd"] > weak["cost_usd"] > 0


async def test_a_record_has_what_a_replay_needs() -> None:
    async with _chooser(auto_config("default", _PRICE | {"exploration": 0.2})) as chooser:
        first, second = await _talk(chooser, "0.9", "0.0", num_tokens=70)
    logged = second.logged("mine")
    assert (logged.choice, logged.mechanism, logged.current, logged.turns_below) == (STRONG, "held", STRONG, 0)
    assert (logged.policy, logged.propensity, logged.preferred) == ("mine", 0.9, STRONG)
    assert [candidate.warm_tokens for candidate in logged.candidates] == [0, 70]
    assert first.logged("mine").score == 0.9
