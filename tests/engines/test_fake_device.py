"""The witness of the tests that say "the host does not wait" notices all the ways of waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.engines.fake_device import DEVICE, FakeDevice, HostWaits, ReadTooEarly


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with FakeDevice() as device:
        yield device


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool((x > 1).any()),
    "a number of python's": lambda x: int(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "where of one": lambda x: torch.where(x > 1),
    "a mask as index": lambda x: x[x > 1],
    "a mask as place": lambda x: x.__setitem__(x > 1, torch.zeros((), device=DEVICE)),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "an index of the host": lambda x: x[torch.tensor([1, 2])],
    "a list as index": lambda x: x[[1, 2]],
    "a tensor of the host": lambda x: x + torch.arange(4),
    "made from the host's numbers": lambda x: x + torch.tensor([1, 2, 3, 4], device=DEVICE),
    "a copy of ordinary memory": lambda x: torch.arange(4).to(DEVICE),
    "and not to wait for it": lambda x: torch.arange(4).to(DEVICE, non_blocking=True),
    "a copy of pinned memory that is waited for": lambda x: torch.arange(4).pin_memory().to(DEVICE),
    "written from the host": lambda x: x.copy_(torch.arange(4)),
    "written to the host": lambda x: torch.arange(4).copy_(x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", WAITING)
def test_waiting_is_noticed(device: FakeDevice, what: str, inference: bool) -> None:
    x = device.hold(torch.arange(4))
    with torch.inference_mode(inference), pytest.raises(HostWaits):
        WAITING[what](x)


def test_what_is_queued_has_the_values_it_would_have(device: FakeDevice) -> None:
    x = device.hold(torch.arange(4))
    x[1:3] += 10
    index = torch.tensor([3, 0]).pin_memory().to(DEVICE, non_blocking=True)
    x[index] = torch.full((2,), 7, device=DEVICE)
    mask = x.masked_fill(x > 10, -1)
    assert device.values(torch.cat([x, mask])).tolist() == [7, 11, 12, 7, 7, -1, -1, 7]
    assert (device.num_sent, device.num_reads) == (1, 0)


def test_a_read_is_counted_and_must_not_come_early(device: FakeDevice) -> None:
    x = device.hold(torch.arange(4))
    assert x.cpu().tolist() == [0, 1, 2, 3]
    assert device.num_reads == 1
    device.busy = True
    with pytest.raises(ReadTooEarly):
        x.cpu()
