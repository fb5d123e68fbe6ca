"""A transformers model made fast on the CPU, in place: packed linears, native norms, fused MLPs and attention blocks.

The model's own loop over its layers stays; modules in it are exchanged for others that compute the same, and each
exchange is checked on random input first. `optimize` is the door.

The linears alone, 3072 x 1024 in bf16, 2 threads, microseconds (medians of 12 interleaved turns on a shared machine
of 2 Zen 5 cores: rough, and fewer rows were not measurable there):

    rows                 16     32     80     512
    torch               442    510    842    4397
    oneDNN, prepacked   273    360    689    3863
    packed              197    242    595    3808

`python -m benchmarks.step_profile` measures whole steps, stage by stage.
"""

from engines.optimized.optimize import Optimizations, optimize

__all__ = ["Optimizations", "optimize"]
