"""Arrays of the host on a device, in one copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.staging import send, send_indices, to_device
from tests.engines.fake_device import DEVICE, FakeDevice

CPU = torch.device("cpu")
ARRAYS: list[NDArray[Any]] = [
    np.arange(5, dtype=np.int64),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.zeros(0, np.float32),
    np.array([0.5, -1.5, np.inf], np.float64),
    np.arange(20, dtype=np.int64).reshape(10, 2)[:, 1],  # not contiguous
]


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with FakeDevice() as device:
        yield device


def test_arrays_arrive_in_one_copy_with_shapes_and_dtypes(device: FakeDevice) -> None:
    sent = send(ARRAYS, DEVICE)
    assert device.num_sent == 1
    for tensor, array in zip(sent, ARRAYS, strict=True):
        assert tensor.device == DEVICE
        values = device.values(tensor).numpy()
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array)


def test_every_array_begins_at_a_multiple_of_16_bytes(device: FakeDevice) -> None:
    for tensor in send(ARRAYS, DEVICE):
        assert tensor.storage_offset() * tensor.itemsize % 16 == 0


def test_nothing_and_empty_arrays_are_sent_as_well(device: FakeDevice) -> None:
    assert send([], DEVICE) == []
    assert [list(tensor.shape) for tensor in send([np.zeros((0, 3), np.int32)], DEVICE)] == [[0, 3]]


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(3)
    (tensor,) = send([array], CPU)
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2]
    assert to_device(tensor, CPU) is tensor


def test_a_tensor_and_indices(device: FakeDevice) -> None:
    assert device.values(to_device(torch.tensor([1.5, 2.5]), DEVICE)).tolist() == [1.5, 2.5]
    indices = send_indices(range(2, 5), DEVICE)
    assert (indices.dtype, device.values(indices).tolist()) == (torch.int64, [2, 3, 4])
    assert device.num_sent == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_the_arrays_without_being_waited_for() -> None:
    cuda = torch.device("cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        sent = send(ARRAYS, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, array in zip(sent, ARRAYS, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
