"""The automatic choice: score the request, look at the fleet, decide, remember."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from engines.errors import EngineError
from engines.types import TokenPrompt
from gateway.auto.choice import Choice
from gateway.auto.conversations import Conversation, Conversations, turn_keys
from gateway.auto.fleet_health import FleetHealth
from gateway.auto.prompt import GenerationRequest, most_tokens, router_prompt, usual_tokens
from gateway.auto.router_watch import Active, RouterWatch
from gateway.auto_config import AUTO, AutoCandidate, AutoConfig
from gateway.errors import GatewayError, ModelNotReadyError
from gateway.fleet import Fleet, ServedModel
from gateway.generation import prompts_of
from gateway.openai import ChatCompletionRequest
from gateway.router_metrics import RouterMetrics
from gateway.tenant import tenant_of
from router_models.errors import PolicyError
from router_models.policy import USUAL_QUALITY, Candidate, Decision, Situation, decide
from router_models.policy_config import BoundGoal
from router_models.prompt import Prompt
from router_models.scorer import Score

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

# Beyond this, waiting would end in a timeout for everybody; so some are not scored, and the rest in time.
_MAX_SCORING = 16


class AutoChooser:
    """Chooses among the candidates of one fleet. Used from one event loop; scores in a thread of its own."""

    def __init__(
        self,
        config: AutoConfig,
        fleet: Fleet,
        health: FleetHealth,
        watch: RouterWatch,
        metrics: RouterMetrics,
        log: FilteringBoundLogger,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._health = health
        self._watch = watch
        self._metrics = metrics
        self._log = log
        self._draw = draw
        self._conversations = Conversations(config.max_conversations, config.conversation_ttl_s)
        # One: scoring is mostly Python, and two would only take turns.
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._num_scoring = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the router, and begin to watch for others and over the fleet."""
        await self._watch.start()
        self._tasks = [asyncio.create_task(self._watch.run()), asyncio.create_task(self._health.run())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._scorer.shutdown(wait=False, cancel_futures=True)

    async def choose(self, request: GenerationRequest) -> Choice:
        """Decide, and count and remember it. Raises BadRequestError, ModelNotReadyError if no candidate is up."""
        began_s = time.perf_counter()
        active = self._watch.active
        choice = await self._decide(request, active, self._draw())
        if active is not None and choice.score is not None:
            active.observe(choice.score, choice.situation, choice.decision)
        if choice.turn is not None:
            # What was explored is not what the conversation goes on with.
            kept = Conversation(choice.decision.preferred, choice.decision.turns_below)
            self._conversations.keep(choice.turn, kept)
        self._metrics.chosen(choice.model.name, choice.mechanism, time.perf_counter() - began_s)
        return choice

    async def explain(self, request: GenerationRequest) -> Choice:
        """What `choose` would decide if it did not explore; nothing is counted or remembered."""
        return await self._decide(request, self._watch.active, draw=0.0)

    def answered(self, choice: Choice, num_tokens: int) -> None:
        """So many tokens, prompt and answer, are in the cache of the model that answered."""
        if choice.turn is not None and choice.decision.model == choice.decision.preferred:
            self._conversations.warmed(choice.turn, num_tokens)

    async def _decide(self, request: GenerationRequest, active: Active | None, draw: float) -> Choice:
        prompt = router_prompt(request)
        score = await self._score(active, prompt)
        turns = turn_keys(tenant_of(request), prompt) if isinstance(request, ChatCompletionRequest) else []
        known = self._conversations.find(turns)
        candidates = await self._candidates(request, prompt, score, known)
        situation = _situation(request, prompt, score, active, known)
        decision = self._decision(candidates, situation, draw)
        return Choice(
            model=self._fleet.get(decision.model),
            prompt=prompt,
            candidates=candidates,
            situation=situation,
            decision=decision,
            mechanism=_mechanism(decision, score),
            score=score,
            artifact=None if score is None or active is None else active.router.version,
            feature_version=None if score is None or active is None else active.router.feature_version,
            turn=turns[-1] if turns else None,
        )

    def _decision(self, candidates: tuple[Candidate, ...], situation: Situation, draw: float) -> Decision:
        try:
            return decide(self._config.policy, candidates, situation, draw)
        except PolicyError as error:
            refusal = error
        # Where the request fits nobody's context window, the widest model that is allowed is left to say so itself.
        for window in sorted({c.max_context for c in candidates if c.max_context is not None}, reverse=True):
            widened = [replace(c, max_context=None) if c.max_context == window else c for c in candidates]
            with contextlib.suppress(PolicyError):
                return decide(self._config.policy, widened, situation, draw)
        raise ModelNotReadyError(AUTO, f"{refusal.message}.") from refusal

    async def _score(self, active: Active | None, prompt: Prompt) -> Score | None:
        """None where no router is loaded, it is too slow, or it fails: no request fails with it."""
        if active is None or self._num_scoring >= _MAX_SCORING:
            return None
        self._num_scoring += 1
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._config.decision_timeout_s):
                score = await loop.run_in_executor(self._scorer, active.router.score, prompt)
        except TimeoutError:
            self._log.warning("the router is too slow", limit_s=self._config.decision_timeout_s)
            return None
        except Exception as error:  # noqa: BLE001  # its numbers are data, and no data may end a request
            self._log.error("the router failed", artifact=active.router.version, exc_info=error)
            return None
        finally:
            self._num_scoring -= 1
        # A bound is calibrated on needs as they are: moved ones would be held against a threshold of another scale.
        is_bound = isinstance(self._config.policy.goal, BoundGoal)
        return score if is_bound else score.adapted(active.drift.share)

    async def _candidates(
        self, request: GenerationRequest, prompt: Prompt, score: Score | None, known: Conversation | None
    ) -> tuple[Candidate, ...]:
        """In the order of the configuration."""
        probabilities = score.prob_right if score is not None else (None,) * len(self._config.candidates)
        found = []
        for entry, prob_right in zip(self._config.candidates, probabilities, strict=True):
            warm_tokens = known.warm_tokens if known is not None and known.model == entry.model else 0
            candidate = Candidate(
                model=entry.model,
                cost_usd=self._cost_usd(entry, request, prompt),
                prob_right=prob_right,
                is_up=self._health.trouble(entry.model) is None,
                is_saturated=self._health.is_saturated(entry.model),
                warm_tokens=warm_tokens,
            )
            found.append(await self._measured(candidate, request, prompt) if candidate.is_up else candidate)
        return tuple(found)

    def _cost_usd(self, entry: AutoCandidate, request: GenerationRequest, prompt: Prompt) -> float:
        num_output_tokens = request.wanted_tokens() or self._config.expected_output_tokens
        return entry.cost_usd(usual_tokens(prompt), num_output_tokens * request.num_choices)

    async def _measured(self, candidate: Candidate, request: GenerationRequest, prompt: Prompt) -> Candidate:
        """With the model's context window, and the request's tokens counted where they might not fit it."""
        model = self._fleet.get(candidate.model)
        room = model.card.max_model_len
        wanted = request.wanted_tokens() or 1
        if room is None or most_tokens(prompt) + wanted <= room:
            return candidate
        return replace(candidate, max_context=room, num_tokens=wanted + await _num_tokens(request, model, prompt))


def _situation(
    request: GenerationRequest, prompt: Prompt, score: Score | None, active: Active | None, known: Conversation | None
) -> Situation:
    return Situation(
        num_tokens=usual_tokens(prompt),
        tenant=tenant_of(request),
        quality=USUAL_QUALITY if request.quality is None else request.quality,
        need=None if score is None else score.need,
        # Without a score every request is one that the router does not trust itself with, whatever was promised.
        threshold=0.0 if active is None or score is None else active.threshold.value(),
        abstains=score is None or score.abstains,
        current=None if known is None else known.model,
        turns_below=0 if known is None else known.turns_below,
    )


def _mechanism(decision: Decision, score: Score | None) -> str:
    return "fallback" if score is None and decision.mechanism in ("abstained", "model") else decision.mechanism


async def _num_tokens(request: GenerationRequest, model: ServedModel, prompt: Prompt) -> int:
    """Tokens of the longest of the request's prompts, by the model's own tokenizer where the gateway has it."""
    with contextlib.suppress(GatewayError, EngineError):
        prompts = await prompts_of(request, model)
        return max(
            len(found.token_ids) if isinstance(found, TokenPrompt) else usual_tokens(prompt) for found in prompts
        )
    return usual_tokens(prompt)
