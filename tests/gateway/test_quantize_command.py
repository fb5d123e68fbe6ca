"""`outrider quantize` and what `outrider check` says of quantized models, over the demo's smallest checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gateway.cli import app

DRAFT = Path(__file__).parents[2] / "demo" / "models" / "draft"
MID = DRAFT.parent / "mid"

pytestmark = [
    pytest.mark.skipif(not DRAFT.exists(), reason="no checkpoints in demo/models"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_writes_a_checkpoint_that_is_served(tmp_path: Path) -> None:
    from engines.build import load_engine
    from engines.config import LocalEngineConfig

    out = tmp_path / "int4"
    result = run(DRAFT, "--to", "int4", "--out", out)
    assert (result.exit_code, result.exception) == (0, None)
    assert "22 layers quantized" in result.stdout
    memory = re.search(r"in memory .* before, ([\d.]+) MB now \(([\d.]+) MB planned\)", result.stdout)
    assert memory is not None
    assert float(memory[1]) == pytest.approx(float(memory[2]), rel=0.02)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (DRAFT / name).read_bytes()
    loaded = load_engine(LocalEngineConfig(model=str(out), device="cpu", kv_cache_bytes=1 << 24, costs_file=""))
    assert loaded.card.details["quantization"] == "int4 in groups of 32, int8"


def test_group_size_and_head(tmp_path: Path) -> None:
    result = run(DRAFT, "--to", "int4", "--out", tmp_path / "a", "--group-size", "64", "--keep-head")
    assert result.exit_code == 0
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    sizes = {group["weights"].get("group_size") for group in settings["config_groups"].values()}
    assert 64 in sizes
    assert settings["ignore"] == ["lm_head"]


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is there already" in refusal(DRAFT, "--to", "int8", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    assert "is quantized already" in refusal(MID, "--to", "int8", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    assert "GGUF" in refusal(tmp_path / "model.gguf", "--to", "int8", "--out", tmp_path / "a")


def test_no_model_is_refused(tmp_path: Path) -> None:
    assert "no folder" in refusal(tmp_path / "absent", "--to", "int8", "--out", tmp_path / "a")


@pytest.mark.parametrize("option", [("--to", "int3"), ("--to", "int4", "--group-size", "48")])
def test_an_unknown_scheme_is_a_usage_error(option: tuple[str, ...], tmp_path: Path) -> None:
    result = run(DRAFT, *option, "--out", tmp_path / "a")
    assert result.exit_code == 2
    assert option[-2] in result.stderr


def test_check_plans_the_memory_of_quantized_weights(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from engines.quant.memory import planned_bytes
    from gateway.checks import check_file
    from gateway.serve_file import load_serve_file

    path = tmp_path / "fleet.yaml"
    path.write_text(
        "applications:\n"
        "- import_path: gateway.app:build_app\n"
        "  args:\n"
        "    models:\n"
        f"    - {{name: a, engine: {{kind: local, model: {DRAFT}, quantization: int4}}, actor: {{num_cpus: 0.1}}}}\n"
        f"    - {{name: b, engine: {{kind: local, model: {DRAFT}}}, actor: {{num_cpus: 0.1}}}}\n"
        "    ingress: {actor: {num_cpus: 0.1}}\n"
    )
    quantized, plain = check_file(load_serve_file(path))
    assert quantized.weight_bytes == planned_bytes(AutoConfig.from_pretrained(DRAFT), "int4")
    assert plain.weight_bytes == (DRAFT / "model.safetensors").stat().st_size
