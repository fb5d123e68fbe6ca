"""The engine benchmark runs and prints what it promises."""

import json
import subprocess
import sys

import pytest


def test_json_is_the_last_line_and_has_a_row_per_system_and_load() -> None:
    command = "-m benchmarks.engine --shape qwen3-tiny --sequences 1,2 --context 12 --new-tokens 4 --rounds 1 --json"
    answer = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=True)
    document = json.loads(answer.stdout.splitlines()[-1])
    assert {"commit", "cpu", "torch", "threads", "shape"} <= document["environment"].keys()
    systems = ("outrider", "transformers", "transformers_continuous_batching")
    rows = {(row["system"], row["sequences"], row["context"]): row for row in document["runs"]}
    assert rows.keys() == {(system, sequences, 12) for system in systems for sequences in (1, 2)}
    for row in rows.values():
        assert row["decode_tokens_per_s"] > 0
        assert row["prefill_tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] * row["step_ms"] / 1000 == pytest.approx(row["sequences"], rel=0.05)


def test_an_unknown_peer_is_refused() -> None:
    command = "-m benchmarks.engine --shape qwen3-tiny --peers nobody"
    answer = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "nobody" in answer.stderr
