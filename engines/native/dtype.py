"""Value types as they cross the C ABI (`src/dtype.h`)."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.bfloat16: 0, torch.float32: 1}
