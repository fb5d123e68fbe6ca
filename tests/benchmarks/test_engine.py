"""The engine benchmark runs and prints what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from benchmarks import engine, environment
from benchmarks.engine_systems import Prompts, Timing


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
    assert len(document["ratios"]) == 4


def test_llama_cpp_is_measured_beside_us_and_its_build_named(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'outrider[bench]'")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'outrider[bench]'")
    command = "-m benchmarks.engine --shape qwen3-tiny --peers llama.cpp --loads 1x12,3x8 --new-tokens 4 --rounds 2"
    saved = tmp_path / "engine.json"
    subprocess.run([sys.executable, *command.split(), "--save", saved], capture_output=True, check=True)
    document = json.loads(saved.read_text())
    assert "CPU" in document["environment"]["llama_cpp_build"]
    loads = {(ratio["peer"], ratio["sequences"], ratio["context"]) for ratio in document["ratios"]}
    assert loads == {("llama.cpp", 1, 12), ("llama.cpp", 3, 8)}
    assert all(ratio["decode"] > 0 and ratio["prefill"] > 0 for ratio in document["ratios"])
    assert {row["system"] for row in document["runs"]} == {"outrider", "llama.cpp"}


def test_our_quantized_engine_is_a_peer_and_each_load_is_saved(tmp_path: Path) -> None:
    command = "-m benchmarks.engine --shape qwen3-tiny --peers int8 --loads 1x12 --new-tokens 4 --rounds 1"
    saved = tmp_path / "engine.json"
    subprocess.run([sys.executable, *command.split(), "--save", saved], capture_output=True, check=True)
    document = json.loads(saved.read_text())
    assert [row["system"] for row in document["runs"]] == ["outrider", "outrider_int8"]
    assert document["ratios"][0]["peer"] == "outrider_int8"


class Scripted:
    """A system whose runs take as long as it is told; it notes what it was asked for."""

    def __init__(self, name: str, log: list[tuple[str, int]], *timings: Timing) -> None:
        self.name, self._log, self._timings = name, log, list(timings)

    def run(self, prompts: Prompts, num_new: int) -> Timing:
        self._log.append((self.name, num_new))
        return self._timings.pop(0)

    def close(self) -> None: ...


def test_a_ratio_is_the_median_of_the_rounds_own_ratios_without_the_warm_up() -> None:
    log: list[tuple[str, int]] = []
    ours = Scripted("outrider", log, Timing(99, 99), Timing(1, 1), Timing(1, 10), Timing(4, 2))
    peer = Scripted("peer", log, Timing(1, 1), Timing(2, 3), Timing(3, 20), Timing(4, 8))
    (timings,) = engine.measure([ours, peer], [(2, 5)], num_new=7, rounds=3, vocab=9)
    assert engine.ratios(timings) == [{"peer": "peer", "sequences": 2, "context": 5, "decode": 3.0, "prefill": 2.0}]
    assert [row["decode_tokens_per_s"] for row in engine.rows(timings, 7)] == [6.0, 1.5]
    assert log == [
        *(("outrider", 4), ("peer", 4), ("peer", 7), ("outrider", 7)),
        *(("outrider", 7), ("peer", 7), ("peer", 7), ("outrider", 7)),
    ]


def test_loads_are_named_or_crossed() -> None:
    assert engine._loads(engine._LOADS, "", "") == [(1, 128), (4, 128), (16, 128), (16, 512)]
    assert engine._loads(engine._LOADS, "1,2", "8,9") == [(1, 8), (2, 8), (1, 9), (2, 9)]
    assert engine._loads(engine._LOADS, "", "8") == [(1, 8), (4, 8), (16, 8)]
    for bad in ("16", "1x2x3", "ax2", "0x5"):
        with pytest.raises(typer.BadParameter, match=bad):
            engine._loads(bad, "", "")


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(typer.BadParameter, match=r"llama_cpp and gguf.*pip install 'outrider\[bench\]'"):
        engine._peers("transformers,llama.cpp")
    assert engine._peers("transformers,transformers") == ["transformers"]


def test_an_unknown_peer_is_refused() -> None:
    command = "-m benchmarks.engine --shape qwen3-tiny --peers nobody"
    answer = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "nobody" in answer.stderr
