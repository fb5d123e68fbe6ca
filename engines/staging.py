"""From the host to the model's device, without making the host wait for it.

A copy from ordinary memory to a GPU stops the host until the GPU has done everything it was given before. A copy from
pinned memory is queued like a kernel; torch hands that memory out again only when the copy is done. On a CPU nothing is
copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT_BYTES = 16  # of each array's place, since Triton compiles anew for memory that is less aligned


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of their shapes and dtypes on `device`: in one copy, or as they are on a CPU."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    places = [-(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for array in arrays]
    starts = list(accumulate(places, initial=0))
    staged = torch.empty(starts.pop(), dtype=torch.uint8, pin_memory=True)
    memory = staged.numpy()
    for start, array in zip(starts, arrays, strict=True):
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = staged.to(device, non_blocking=True)
    return [_part(sent, start, array) for start, array in zip(starts, arrays, strict=True)]


def send_indices(indices: Sequence[int], device: torch.device) -> Tensor:
    """int64 [num_indices] on `device`."""
    return send((np.array(indices, np.int64),), device)[0]


def _part(sent: Tensor, start: int, array: NDArray[Any]) -> Tensor:
    dtype = torch.from_numpy(array).dtype
    return sent[start : start + array.nbytes].view(dtype).view(array.shape)
