"""The GPU benchmark, on a CPU: what it runs and prints, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.gpu_engine import bytes_per_step, copy_bandwidth, with_bandwidth


def test_json_is_the_last_line_and_has_a_row_per_setting_and_load() -> None:
    command = "-m benchmarks.gpu_engine --shape qwen3-tiny --device cpu --sequences 1,2 --context 12 --new-tokens 4"
    settings = "--settings torch,reference --rounds 1 --json"
    answer = subprocess.run([sys.executable, *command.split(), *settings.split()], capture_output=True, check=True)
    document = json.loads(answer.stdout.splitlines()[-1])
    assert document["environment"]["copy_bytes_per_s"] > 1e8
    systems = ("outrider", "outrider_reference", "transformers")
    rows = {(row["system"], row["sequences"]): row for row in document["runs"]}
    assert rows.keys() == {(system, sequences) for system in systems for sequences in (1, 2)}
    for (system, _), row in rows.items():
        if system != "transformers":  # a difference of two times, here too short to be told
            assert row["decode_tokens_per_s"] > 0
            assert row["share_of_bandwidth"] < 1
    assert {ratio["peer"] for ratio in document["ratios"]} == {"outrider_reference", "transformers"}


def test_graphs_are_refused_where_there_is_no_gpu() -> None:
    command = "-m benchmarks.gpu_engine --shape qwen3-tiny --device cpu --settings torch+graphs --context 12"
    answer = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=False)
    assert answer.returncode != 0
    assert "cuda_graphs needs attention_backend: triton" in answer.stderr


def test_share_of_bandwidth_is_what_a_step_reads_over_what_a_copy_moves_meanwhile() -> None:
    row = {"sequences": 1, "context": 510, "step_ms": 5.0}
    share = with_bandwidth(row, "qwen3-8b", num_new=4, bandwidth=4e12)["share_of_bandwidth"]
    assert share == pytest.approx(bytes_per_step("qwen3-8b", 1, 512) / (0.005 * 4e12), abs=1e-3)
    assert share == pytest.approx(0.76, abs=0.01)


def test_copies_take_time() -> None:
    assert 1e8 < copy_bandwidth("cpu") < 1e13


class TestBytesPerStep:
    def test_weights_of_the_8b_shape_without_the_embeddings_looked_up(self) -> None:
        assert bytes_per_step("qwen3-8b", 1, 0) == pytest.approx(2 * 7.57e9, rel=0.01)

    def test_tied_embeddings_are_read_as_the_output_projection(self) -> None:
        assert bytes_per_step("qwen3-0.6b", 1, 0) == pytest.approx(2 * 0.596e9, rel=0.01)

    def test_cache_of_every_sequence(self) -> None:
        per_token = 2 * 2 * 36 * 8 * 128
        assert bytes_per_step("qwen3-8b", 16, 100) - bytes_per_step("qwen3-8b", 16, 0) == 16 * 100 * per_token
