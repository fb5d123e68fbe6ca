import gc
import sys
from collections.abc import Iterator

import pytest

from gateway.process import begin_to_serve


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    interval, frozen, thresholds = sys.getswitchinterval(), gc.get_freeze_count(), gc.get_threshold()
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)
    if not frozen:
        gc.unfreeze()


def test_what_is_loaded_is_left_alone_and_threads_wait_less() -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    begin_to_serve()
    assert sys.getswitchinterval() < 0.001
    assert gc.get_threshold()[0] > 700
    assert not any(one is cycle for one in gc.get_objects())


def test_a_shorter_interval_is_kept() -> None:
    sys.setswitchinterval(0.0001)
    begin_to_serve()
    assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.1)
