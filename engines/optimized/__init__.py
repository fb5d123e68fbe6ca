"""A transformers model made fast on the CPU, in place: packed linears, native norms, fused MLPs and attention blocks,
and where a layer consists of those alone, the whole layer in one native call.

The model's own loop over its layers stays; modules in it are exchanged for others that compute the same, and each
exchange is checked on random input first. `optimize` is the door.

The linears alone, 3072 x 1024 in bf16, 2 threads, microseconds (medians of 12 interleaved turns on a shared machine
of 2 Zen 5 cores: rough, and fewer rows were not measurable there):

    rows                 16     32     80     512
    torch               442    510    842    4397
    oneDNN, prepacked   273    360    689    3863
    packed              197    242    595    3808

A whole layer in one call gives the same bits as its parts. What it saves is Python between them, and most of it where
rows are few (milliseconds of a forward, medians of 60 and 300 interleaved turns, 128 tokens of context, 2026-11-21):

    sequences                     1      4     16
    20 layers, 0.5 B   parts   29.7   31.3   42.2
                       whole   26.4   28.7   38.0
    3 layers, 1.6 M    parts   0.56   0.54   0.56
                       whole   0.32   0.31   0.37

`python -m benchmarks.step_profile` measures whole steps, stage by stage.
"""

from engines.optimized.optimize import Optimizations, optimize

__all__ = ["Optimizations", "optimize"]
