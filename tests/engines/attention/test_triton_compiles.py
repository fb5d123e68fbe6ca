"""The kernels compile to machine code of real GPUs, none of which has to be there, and fit their shared memory.

In processes of their own, since kernels in this one may be for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SMALLEST_SHARED_MEMORY = 99 << 10  # of a block on consumer GPUs since Ampere

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engines.attention import triton_kernel as kernels
from engines.attention.triton_launch import Heads

def compiled(kernel, constants, num_warps, **types):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As at run time: memory and strides are aligned.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names) if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target, options = GPUTarget("cuda", int(sys.argv[1]), 32), {"num_warps": num_warps, "num_stages": 2}
    binary = triton.compile(source, target=target, options=options)
    assert binary.asm["cubin"]
    return {"shared": binary.metadata.shared, "uses_tensor_cores": "mma" in binary.asm["ptx"]}

def attend(dtype, heads, is_split, **options):
    shape = heads.short_tile if is_split else heads.long_tile
    rows = dict.fromkeys(("query", "key_cache", "value_cache", "output", "sinks"), "*" + dtype)
    partial = dict.fromkeys(("partial_output", "partial_best", "partial_total"), "*fp32")
    work = dict.fromkeys(("tiles", "cu_seqlens_q", "kv_lens", "block_table"), "*i32")
    constants = dict(
        HAS_SINKS=False, SOFTCAP=0.0, WINDOW=0, IS_SPLIT=is_split, SPLIT_TOKENS=256, BLOCK_SIZE=16, GROUP=heads.group,
        TILE_ROWS=shape.rows, TILE_KEYS=heads.tile_keys, PRECISION="ieee", **heads.constants,
    ) | options
    return compiled(
        kernels.attend_kernel, constants, 4 if is_split else 8, scaling="fp32", **rows, **partial, **work
    )

results = []
for is_split in (True, False):
    results.append(attend("bf16", Heads(8, 2, 128, 128, 2), is_split))
    results.append(attend("bf16", Heads(8, 8, 128, 128, 2), is_split, WINDOW=4096, HAS_SINKS=True))
    results.append(attend("bf16", Heads(4, 2, 256, 256, 2), is_split, SOFTCAP=50.0))
    results.append(attend("fp16", Heads(1, 71, 80, 96, 2), is_split))
    results.append(attend("fp32", Heads(2, 3, 128, 128, 4), is_split) | {"uses_tensor_cores": True})
partial = dict.fromkeys(("partial_output", "partial_best", "partial_total"), "*fp32")
constants = dict(
    HAS_SINKS=True, WINDOW=128, SPLIT_TOKENS=256, NUM_HEADS=16, VALUE_DIM=96, VALUE_LANES=128, MERGED_SPLITS=16
)
types = dict(output="*bf16", sinks="*bf16", tokens="*i32", positions="*i64", **partial)
results.append(compiled(kernels.merge_kernel, constants, 2, **types) | {"uses_tensor_cores": True})
types = dict.fromkeys(("key", "value", "key_cache", "value_cache"), "*bf16") | {"slot_mapping": "*i64"}
written = compiled(kernels.write_kernel, Heads(8, 2, 80, 96, 2).constants, 1, **types)
results.append(written | {"uses_tensor_cores": True})
print(json.dumps(results))
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_for(capability: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, capability]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) == 12
    assert max(result["shared"] for result in results) <= SMALLEST_SHARED_MEMORY
    assert all(result["uses_tensor_cores"] for result in results)
