"""Bounds are calibrated on what the router has not seen."""

import numpy as np
import pytest

from router_models.errors import DataError
from router_models.safe_threshold import safe_threshold
from router_models.train import Trained
from tests.router_models.tables import world

_PAIR = ("acme/Strong-1_5", "weak")


def test_prompts_of_the_training_do_not_count(trained: Trained) -> None:
    router = trained.router
    choices = router.candidates(_PAIR, "world")
    seen, new = world(500, seed=1), world(200, seed=77)
    both = safe_threshold(router, choices, [seen, new], *_PAIR, max_loss=0.3, confidence=0.9)
    alone = safe_threshold(router, choices, [new], *_PAIR, max_loss=0.3, confidence=0.9)
    assert both == alone
    assert (alone.num_prompts, alone.threshold > -np.inf) == (200, True)
    assert safe_threshold(router, choices, [seen], *_PAIR, max_loss=0.3, confidence=0.9).threshold == -np.inf


def test_sources_without_one_of_the_models_are_passed_over(trained: Trained) -> None:
    choices = trained.router.candidates(_PAIR, "world")
    other = world(60, seed=78, models=("weak", "tiny"))
    new = world(100, seed=79)
    found = safe_threshold(trained.router, choices, [other, new], *_PAIR, max_loss=0.3, confidence=0.9)
    assert found.num_prompts == 100
    with pytest.raises(DataError, match="both acme/Strong-1_5 and weak"):
        safe_threshold(trained.router, choices, [other], *_PAIR, max_loss=0.3, confidence=0.9)
