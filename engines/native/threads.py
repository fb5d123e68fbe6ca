"""How many threads the kernels work on: torch's number, also while torch itself has stepped back for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_number: ContextVar[int | None] = ContextVar("outrider_kernel_threads", default=None)


def num_threads() -> int:
    """Threads for a kernel that is called now."""
    return _number.get() or torch.get_num_threads()


@contextmanager
def reserved_for_kernels() -> Iterator[None]:
    """Meanwhile, in this thread, torch computes on one thread and the kernels on as many as torch had.

    For forwards in which torch has small things to do only: its threads, once woken, stay on their cores for a while
    to look for more, where the kernels' own want to be.
    """
    number = torch.get_num_threads()
    token = _number.set(number)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
        _number.reset(token)
