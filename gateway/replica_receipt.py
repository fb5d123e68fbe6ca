"""The receipt's section on replicas: one entry for each prompt of the request, in the prompts' order."""

from __future__ import annotations

from collections.abc import Callable

from engines.protocol import Engine
from engines.types import GenerateRequest
from gateway.answers import JsonObject
from gateway.generation import Items
from gateway.receipts import Receipt
from gateway.routing.placer import Explains

SECTION = "replica"


def generating(engine: Engine, receipt: Receipt) -> Callable[[GenerateRequest], Items]:
    """`engine.generate`, each call of which adds its entry to the receipt; entries fill up while the calls go on."""
    if not isinstance(engine, Explains):
        return engine.generate
    entries: list[JsonObject] = []
    receipt.add(SECTION, {"policy": engine.policy, "prompts": entries})
    explains = engine

    def generate(request: GenerateRequest) -> Items:
        entry: JsonObject = {}
        entries.append(entry)
        return explains.generate_noting(request, entry)

    return generate


async def replica_section(engine: Engine, requests: list[GenerateRequest]) -> JsonObject:
    """The same section without inference."""
    if not isinstance(engine, Explains):
        return {"policy": "single", "prompts": []}
    return {"policy": engine.policy, "prompts": [await engine.explain(request) for request in requests]}
