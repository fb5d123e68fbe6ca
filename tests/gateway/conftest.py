"""What is made once for several files: routers for the tests of `auto`, and a fleet with two replicas."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gateway.auto_world import save_router

if TYPE_CHECKING:
    from tests.gateway.replica_fleet import ReplicaFleet


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_router(tmp_path_factory.mktemp("routers") / "first", seed=1)


@pytest.fixture(scope="session")
def other_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_router(tmp_path_factory.mktemp("routers") / "second", seed=2)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[ReplicaFleet]":
    """test_redis_faults_serve uses it first, and the end of test_replicas_serve is its end."""
    from tests.engines.tiny_models import SUPPORTED, save
    from tests.engines.tokenizers import character_tokenizer
    from tests.gateway.replica_fleet import ReplicaFleet, until

    config = SUPPORTED["llama"]()
    config.max_position_embeddings = 4096
    model = save(config, tmp_path_factory.mktemp("tiny"))
    character_tokenizer().save_pretrained(model)
    running = ReplicaFleet(tmp_path_factory.mktemp("serve"), model, tmp_path_factory.mktemp("r"))
    try:
        until(running.is_ready, 120)
        yield running
    finally:
        running.close()
