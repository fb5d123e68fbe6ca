"""Weight-only int8 in the compressed-tensors format: every linear layer, one scale an output channel, symmetric.

The embedding, which is also the output layer, and the norms stay bf16. `AutoModelForCausalLM.from_pretrained` reads the
result through the compressed-tensors library; the layout is the "int-quantized" one, written here without it:
for a layer `w`, `w.weight` int8 `[out, in]` and `w.weight_scale` `[out, 1]`, with weight = int8 * scale.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo.model import WEIGHTS_FILE

LARGEST_INT8 = 127
LINEAR_SUFFIX = "_proj.weight"
QUANTIZATION_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            # Said again for the group: without it the library takes weight-only int8 for the packed format.
            "format": "int-quantized",
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 `[out, in]` and bf16 scales `[out, 1]` of a weight `[out, in]`; each channel's largest entry maps to 127.

    Rounding is to the scale as stored, so that it is the nearest step and not the nearest to an unrounded scale.
    """
    weight = weight.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / LARGEST_INT8).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.to(torch.bfloat16)
    steps = (weight / scale.float()).round().clamp(-LARGEST_INT8, LARGEST_INT8)
    return steps.to(torch.int8), scale


def dequantize(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 weight `[out, in]` that int8 `steps` and `scale` `[out, 1]` stand for."""
    return steps.float() * scale.float()


def quantize_folder(folder: Path) -> None:
    """Replaces the bf16 checkpoint in `folder` by its int8 form, in place."""
    path = folder / WEIGHTS_FILE
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path).items():
        if name.endswith(LINEAR_SUFFIX):
            tensors[name], tensors[f"{name}_scale"] = quantize(weight)
        else:
            tensors[name] = weight
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it is written for its owner alone
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["quantization_config"] = QUANTIZATION_CONFIG
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
