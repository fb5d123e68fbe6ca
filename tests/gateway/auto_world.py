"""Fleets of echoing engines behind `auto`, and routers of a small world whose truth is known."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gateway.auto_config import AutoConfig
from gateway.config import GatewayConfig
from router_models import artifact
from router_models.prompt import Prompt
from router_models.train import train
from tests.gateway.fakes import config
from tests.router_models.tables import TOPICS, world

STRONG, WEAK = "strong", "weak"
# Both right, both wrong, and what only the strong one knows.
EASY, HOPELESS, HARD = (TOPICS[name][0].split() for name in ("colours", "topology", "algebra"))
_ABILITIES = {STRONG: "acme/Strong-1_5", WEAK: "weak"}


def save_router(folder: Path, seed: int) -> Path:
    """A router of the small world."""
    trained = train([world(300, seed=1)], seed=seed)
    artifact.save(trained.router, artifact.Origin("2026-01-01T00:00:00+00:00", "0" * 64, seed), folder)
    return folder


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait for something that happens elsewhere."""
    for _ in range(int(limit_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def version_of(folder: Path) -> str:
    return artifact.load(folder).manifest.version


def damaged(router: Path, folder: Path) -> Path:
    """A copy of it whose numbers have lost a byte."""
    shutil.copytree(router, folder)
    arrays = folder / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1])
    return folder


def question(words: list[str], number: int = 0, num_words: int = 8) -> str:
    """As the small world asks; any two numbers are two questions."""
    chosen = np.random.default_rng(number).choice(words, size=num_words)
    return f"Question {100_000 + 7919 * number % 900_000}: {' '.join(chosen)}?"


def prompt(words: list[str], number: int = 0) -> Prompt:
    return Prompt.from_text(question(words, number))


def candidate(model: str, price: float, ability: str | None = None) -> dict[str, object]:
    return {
        "model": model,
        "ability": ability,
        "usd_per_million_input_tokens": price,
        "usd_per_million_output_tokens": 4 * price,
    }


def auto_fields(router: Path | str, policy: dict[str, object] | None = None, **fields: object) -> dict[str, object]:
    """`auto` over a weak and a strong model, without chance."""
    candidates = [candidate(WEAK, 1.0, _ABILITIES[WEAK]), candidate(STRONG, 10.0, _ABILITIES[STRONG])]
    chosen = {"exploration": 0.0, "goal": {"kind": "share", "strong_share": 0.4}} | (policy or {})
    # A busy machine must not turn every decision into a fallback.
    rest: dict[str, object] = {"artifact": str(router), "policy": chosen, "decision_timeout_s": 30.0}
    return {"candidates": candidates} | rest | fields


def auto_config(router: Path | str, policy: dict[str, object] | None = None, **fields: object) -> AutoConfig:
    return AutoConfig.model_validate(auto_fields(router, policy, **fields))


def settings(auto: dict[str, object], **fields: object) -> GatewayConfig:
    """A gateway over `echo`, `weak` and `strong`."""
    return config("echo", WEAK, STRONG, auto=auto, **fields)
