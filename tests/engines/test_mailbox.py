"""Deltas between the step and a reader of any speed."""

import asyncio

import pytest

from engines.errors import EngineDeadError
from engines.mailbox import Mailbox
from engines.types import Delta, TokenLogprob, Usage

USAGE = Usage(1, 2)


async def test_what_was_not_read_yet_is_merged_by_choice() -> None:
    mailbox = Mailbox(2)
    logprob = TokenLogprob("a", -1.0)
    mailbox.put((Delta(0, "a", (1,), (logprob,)), Delta(1, "x", (7,))))
    mailbox.put((Delta(0, "b", (2,), (logprob,), "stop", "b", USAGE),))
    assert await mailbox.get() == (Delta(0, "ab", (1, 2), (logprob, logprob), "stop", "b", USAGE), Delta(1, "x", (7,)))
    assert not mailbox.is_finished
    mailbox.put((Delta(1, "", (), None, "length", None, USAGE),))
    await mailbox.get()
    assert mailbox.is_finished


async def test_get_waits_for_news() -> None:
    mailbox = Mailbox(1)
    reader = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    assert not reader.done()
    mailbox.put((Delta(0, "a"),))
    assert await reader == (Delta(0, "a"),)


async def test_failure_comes_after_what_was_put_before() -> None:
    mailbox = Mailbox(1)
    mailbox.put((Delta(0, "a"),))
    mailbox.fail(EngineDeadError("gone"))
    assert await mailbox.get() == (Delta(0, "a"),)
    with pytest.raises(EngineDeadError, match="gone"):
        await mailbox.get()
