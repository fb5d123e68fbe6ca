"""Makes a Llama checkpoint wider and deeper without changing what it computes: the same tokens at a real model's cost.

    python -m benchmarks.upscale --json

Every size grows by a factor `width`: features, query and KV heads (of unchanged width and grouping), and the features
inside the MLP. The old weights become one corner of the new ones.

- New features of the residual stream are always zero: a matrix that writes to the stream (embedding, o_proj, down_proj)
  has zeros in their rows, and in the columns of new heads and new MLP features.
- RMSNorm then takes its mean over `width` times as many features of which only the old ones count, which divides it by
  sqrt(width); norm weights are divided by sqrt(width) and eps by `width` to cancel that. With a width of 4 these are
  powers of two, so bf16 loses nothing.
- A new layer is one whose o_proj and down_proj are zero.

What cannot matter is filled with small random numbers rather than zeros, so that it is read, multiplied and cached like
any weight.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.environment import describe
from benchmarks.workloads import prompts

CACHE = Path.home() / ".cache" / "outrider" / "benchmarks"
DEMO_TARGET = Path(__file__).resolve().parent.parent / "demo" / "models" / "target"
_WEIGHTS = "model.safetensors"
_FORMAT = 1  # part of a cached folder's name: raise it when other weights come out of the same sources
_NOISE = 0.02
_console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Growth:
    """By what factor a checkpoint is widened, and how many layers it then has. Powers of 4 are exact in bf16."""

    width: int = 4
    num_layers: int = 20


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models over the same text: positions with the same most likely token, and the worst relative error of a
    row of logits (largest difference over largest absolute logit)."""

    same_argmax: float
    worst_relative_error: float
    num_positions: int


def materialize(source: Path = DEMO_TARGET, growth: Growth = Growth(), folder: Path = CACHE, seed: int = 0) -> Path:
    """The folder, under `folder`, of the upscaled checkpoint `source`; made there if it is not there yet.

    It appears at once and whole, whoever else is making it, and is named after all that decides its content. Dtype,
    tokenizer, chat template and generation config are the source's. Raises what `upscaled_config` raises.
    """
    path = folder / f"{source.name}-upscaled-{_identity(source, growth, seed)}"
    if path.exists():
        return path
    config = upscaled_config(LlamaConfig.from_pretrained(source), growth)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as workplace:
        made = Path(workplace) / "model"
        shutil.copytree(source, made, ignore=shutil.ignore_patterns(_WEIGHTS, "config.json"))
        config.save_pretrained(made)
        save_file(upscaled_weights(source, growth, seed), made / _WEIGHTS, metadata={"format": "pt"})
        try:
            made.rename(path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise
    return path


def upscaled_config(config: LlamaConfig, growth: Growth) -> LlamaConfig:
    """The config of the upscaled model. Raises ValueError if `growth` shrinks it, or if it has biases."""
    if growth.width < 1 or growth.num_layers < config.num_hidden_layers:
        raise ValueError(f"{growth} is smaller than a model of {config.num_hidden_layers} layers")
    if config.attention_bias or config.mlp_bias:
        raise ValueError("models with biases are not upscaled")
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig.from_dict(
        config.to_dict()
        | {size: getattr(config, size) * growth.width for size in sizes}
        | {
            "head_dim": config.head_dim,
            "num_hidden_layers": growth.num_layers,
            "rms_norm_eps": config.rms_norm_eps / growth.width,
        }
    )


def upscaled_weights(source: Path, growth: Growth, seed: int = 0) -> dict[str, Tensor]:
    """Weights by name, in the source's dtype, of the model that `upscaled_config` describes."""
    config = LlamaConfig.from_pretrained(source)
    old = load_file(source / _WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(upscaled_config(config, growth))
    old_layers = _old_layers(config.num_hidden_layers, growth.num_layers)
    weights = {}
    for name, parameter in skeleton.named_parameters():
        corner = old.get(_old_name(name, old_layers))
        like = next(iter(old.values()))
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            weight = torch.zeros(parameter.shape, dtype=like.dtype)
        else:
            weight = (torch.randn(parameter.shape, generator=generator) * _NOISE).to(like.dtype)
        if corner is not None:
            is_norm = corner.ndim == 1
            weight[tuple(map(slice, corner.shape))] = corner / growth.width**0.5 if is_norm else corner
        weights[name] = weight
    return weights


def compare(model: Path, other: Path, token_ids: Tensor, dtype: torch.dtype) -> Agreement:
    """Both checkpoints, computing in `dtype`, over the rows of `token_ids`, int64 [num_rows, length]."""
    reference, answer = (_logits(path, token_ids, dtype) for path in (model, other))
    errors = (answer - reference).abs().amax(-1) / reference.abs().amax(-1)
    same = reference.max(-1).indices == answer.max(-1).indices
    return Agreement(same.float().mean().item(), errors.max().item(), same.numel())


@torch.inference_mode()
def _logits(path: Path, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [num_rows, length, vocab]."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    return torch.cat([cast(Tensor, model(input_ids=row[None], use_cache=False).logits).float() for row in token_ids])


def _old_layers(num_old: int, num_new: int) -> dict[int, int]:
    """Place in the new stack -> place in the old one: spread evenly, in order, the last one last."""
    return {(i + 1) * num_new // num_old - 1: i for i in range(num_old)}


def _old_name(name: str, old_layers: dict[int, int]) -> str:
    """The source's name of a parameter, "" for one in a new layer."""
    prefix = "model.layers."
    if not name.startswith(prefix):
        return name
    layer, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{old_layers[int(layer)]}.{rest}" if int(layer) in old_layers else ""


def _identity(source: Path, growth: Growth, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, asdict(growth), seed]).encode())
    for path in sorted(source.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sizes(path: Path) -> dict[str, Any]:
    config = LlamaConfig.from_pretrained(path)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    weights = load_file(path / _WEIGHTS)
    return {
        "parameters": sum(weight.numel() for weight in weights.values()),
        "bytes": (path / _WEIGHTS).stat().st_size,
        **{field: getattr(config, field) for field in fields},
    }


def _held_out_text(model: Path, num_rows: int, length: int) -> Tensor:
    """Rows of held-out code, int64 [num_rows, length]."""
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(model))
    return torch.tensor([prompt.token_ids[:length] for prompt in prompts("code", tokenizer, num_rows)])


def main(
    width: Annotated[int, typer.Option(min=1)] = Growth().width,
    layers: Annotated[int, typer.Option(min=1)] = Growth().num_layers,
    source: Annotated[Path, typer.Option(help="folder of the checkpoint to upscale")] = DEMO_TARGET,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document last")] = False,
) -> None:
    """Build the upscaled model and compare it with its source on code that neither was trained on."""
    path = materialize(source, Growth(width, layers))
    text = _held_out_text(source, num_rows=8, length=100)
    sizes = {"source": _sizes(source), "upscaled": _sizes(path)}
    agreement = {
        name: asdict(compare(source, path, text, dtype))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    table = Table("", *sizes["source"])
    for name, row in sizes.items():
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    _console.print(table)
    for name, row in agreement.items():
        _console.print(f"{name}: {row}")
    _console.print(str(path))
    if as_json:
        print(json.dumps({"environment": describe(), "path": str(path), "sizes": sizes, "agreement": agreement}))


if __name__ == "__main__":
    typer.run(main)
