"""One router of the small world, trained once."""

import pytest

from router_models.train import Trained, train
from tests.router_models.tables import world


@pytest.fixture(scope="session")
def trained() -> Trained:
    return train([world(500, seed=1), world(300, seed=2, source="other", models=("acme/Strong-1_5", "weak"))], seed=3)
