"""The trial lets rounding pass, and no other formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.optimized.agreement import agrees, close


class Map(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        assert callable(self.function)
        output: Tensor = self.function(input)
        return output


def test_rounding_agrees() -> None:
    halves = Map(lambda x: (x.float() * 0.5).bfloat16())
    assert agrees(halves, Map(lambda x: x * 0.5 + x * 0.001), 64, torch.bfloat16)
    assert agrees(Map(torch.sin), Map(lambda x: torch.sin(x.double()).float()), 64, torch.float32)


def test_other_formulas_do_not() -> None:
    same = Map(lambda x: x)
    assert not agrees(same, Map(lambda x: x * 1.05), 64, torch.bfloat16)
    assert not agrees(same, Map(lambda x: x.clamp(-7, 7)), 64, torch.float32)
    assert not agrees(same, Map(lambda x: x + 1e-4), 64, torch.float32)
    assert not agrees(same, Map(lambda x: x * torch.nan), 64, torch.float32)


def test_shape_dtype_and_type_are_part_of_it() -> None:
    tensor = torch.ones(2, 3)
    assert close(tensor, tensor.clone())
    assert not close(tensor, tensor[:1])
    assert not close(tensor, tensor.bfloat16())
    assert not close(tensor, (tensor,))
    assert not close(tensor.half(), tensor.half())
