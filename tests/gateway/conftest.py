"""Routers for the tests of `auto`, trained once."""

from pathlib import Path

import pytest

from tests.gateway.auto_world import save_router


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_router(tmp_path_factory.mktemp("routers") / "first", seed=1)


@pytest.fixture(scope="session")
def other_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_router(tmp_path_factory.mktemp("routers") / "second", seed=2)
