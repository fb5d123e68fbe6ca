"""Loops of kernels: every item once, whoever comes and goes; and whose threads are whose."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engines.native.library import library
from engines.native.threads import num_threads, reserved_for_kernels

kernels = library()
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels are not built")


def sum_of_squares(threads: int, items: int) -> int:
    assert kernels is not None
    function = kernels.outrider_sum_of_squares
    function.argtypes, function.restype = (ctypes.c_int32, ctypes.c_int64), ctypes.c_int64
    return int(function(threads, items))


def expected(items: int) -> int:
    return (items - 1) * items * (2 * items - 1) // 6 if items else 0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_is_done_once(threads: int) -> None:
    for items in (0, 1, 2, 3, 7, 100, 10_007):
        assert sum_of_squares(threads, items) == expected(items)


def test_many_short_loops_end() -> None:
    """A worker that is late for one loop must neither hang the next nor work on the one that is over."""
    for turn in range(20_000):
        items = turn % 5
        assert sum_of_squares(2 + turn % 3, items) == expected(items)


def test_workers_that_went_to_sleep_come_back() -> None:
    for _ in range(20):
        threading.Event().wait(0.005)  # longer than an idle worker stays awake
        assert sum_of_squares(3, 1000) == expected(1000)


def test_threads_do_not_share_workers() -> None:
    def many(_: int) -> bool:
        return all(sum_of_squares(3, 501) == expected(501) for _ in range(500))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own() -> None:
    assert sum_of_squares(3, 1000) == expected(1000)
    child = os.fork()
    if child == 0:
        os._exit(0 if sum_of_squares(3, 1000) == expected(1000) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sum_of_squares(3, 1000) == expected(1000)


def test_a_forked_process_ends_though_its_parents_workers_are_gone() -> None:
    code = """
import ctypes, os, sys, time
from engines.native.library import library
def work(): return library().outrider_sum_of_squares(3, ctypes.c_int64(1000))
work(); time.sleep(0.05)  # the workers fall asleep
child = os.fork()
if child and os.waitpid(child, 0)[1]:
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=20)


def test_kernels_take_torchs_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert num_threads() == 3
        with reserved_for_kernels():
            assert (num_threads(), torch.get_num_threads()) == (3, 1)
        assert (num_threads(), torch.get_num_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)
