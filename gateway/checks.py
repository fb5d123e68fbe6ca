"""What can be known about a configuration before anything is loaded: files, architectures, memory, CPUs, GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.config import (
    AutoDrafterConfig,
    EchoEngineConfig,
    LocalEngineConfig,
    ModelDrafterConfig,
    RemoteEngineConfig,
)
from engines.errors import ModelLoadError
from gateway.auto_checks import check_auto
from gateway.config import GatewayConfig, ModelConfig
from gateway.errors import ConfigError
from gateway.serve_file import ServeFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_GIB = 2**30
# What an engine on CPU takes unless told otherwise, at most.
_DEFAULT_KV_BYTES = _GIB
# tokenizer.json, or what transformers can make one from; without any it makes up an empty vocabulary.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One served model in a line.

    `weight_bytes` is what its files and its draft model's hold, 0 where there are none here. `drafter` is empty where
    drafting is not ours to configure.
    """

    name: str
    kind: str
    source: str
    num_replicas: int
    weight_bytes: int
    drafter: str = ""

    def text(self) -> str:
        size = f", {self.weight_bytes / 1e6:,.0f} MB of weights" if self.weight_bytes else ""
        drafter = f", drafter {self.drafter}" if self.drafter else ""
        return f"{self.name}: {self.kind} {self.source}{drafter}{size}, {self.num_replicas} replica(s)"

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


def check_file(file: ServeFile) -> list[ModelSummary]:
    """A summary of each model. Raises ConfigError naming the first that cannot be served on this machine."""
    config = file.application.args
    summaries = [_check_model(model) for model in config.models]
    if config.auto is not None:
        check_auto(config.auto)
    _check_state(config)
    _check_memory(config, summaries)
    _check_reservations(config)
    return summaries


def _check_model(model: ModelConfig) -> ModelSummary:
    engine = model.engine
    weight_bytes, drafter = 0, ""
    match engine:
        case LocalEngineConfig():
            source, weight_bytes = _check_local(model.name, engine)
            drafter, draft_bytes = _check_drafter(model.name, engine)
            weight_bytes += draft_bytes
        case RemoteEngineConfig():
            source = f"{engine.model} at {engine.base_url}"
            if engine.api_key_env is not None and engine.api_key_env not in os.environ:
                raise ConfigError(f"{model.name}: the environment variable {engine.api_key_env} is not set.")
        case EchoEngineConfig():
            source = engine.model
    return ModelSummary(model.name, engine.kind, source, model.num_replicas, weight_bytes, drafter)


def _check_local(name: str, engine: LocalEngineConfig) -> tuple[str, int]:
    from engines.loading import resolve_device  # torch takes seconds to import

    try:
        resolve_device(engine.device)
    except ModelLoadError as error:
        raise ConfigError(f"{name}: {error.message}") from error
    return _check_folder(name, engine.model, engine)


def _check_drafter(name: str, engine: LocalEngineConfig) -> tuple[str, int]:
    """The drafter in words, and how large its weights are, in bytes. Vocabularies are compared when it is loaded."""
    drafter = engine.drafter
    if not isinstance(drafter, AutoDrafterConfig | ModelDrafterConfig) or drafter.model is None:
        return drafter.kind, 0
    source, weight_bytes = _check_folder(f"{name}: drafter", drafter.model, engine)
    return f"{drafter.kind} with {source}", weight_bytes


def _check_folder(name: str, model: str, engine: LocalEngineConfig) -> tuple[str, int]:
    """Where a model is and how large its weights are, in bytes, as `engine` quantizes them. A hub id is left to it."""
    from transformers import AutoConfig

    from engines.loading import check_servable, resolve_source  # torch takes seconds to import

    try:
        folder = Path(resolve_source(model))
        if folder.is_file():  # GGUF, which holds everything
            return str(folder), folder.stat().st_size
        if not folder.is_dir():
            return model, 0
        if not (folder / "config.json").is_file():
            raise ModelLoadError(f"{folder} has no config.json.")
        hf_config = AutoConfig.from_pretrained(folder)
        check_servable(hf_config)
    except ModelLoadError as error:
        raise ConfigError(f"{name}: {error.message}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {folder}/config.json cannot be used: {str(error).splitlines()[0]}") from error
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if weight_bytes == 0:
        raise ConfigError(f"{name}: {folder} has no weights (*.safetensors).")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ConfigError(f"{name}: {folder} has no tokenizer (tokenizer.json).")
    return str(folder), _quantized_bytes(hf_config, engine) or weight_bytes


def _quantized_bytes(hf_config: PretrainedConfig, engine: LocalEngineConfig) -> int | None:
    """Planned bytes of a model that is quantized at load; None for others, which take what their files do."""
    import torch

    from engines.checkpoint_formats import quantization_method
    from engines.quant.memory import planned_bytes

    if engine.quantization == "none" or quantization_method(hf_config) is not None:
        return None
    dtype = None if engine.dtype == "auto" else getattr(torch, engine.dtype)
    return planned_bytes(hf_config, engine.quantization, dtype=dtype)


def _check_state(config: GatewayConfig) -> None:
    password_env = config.state.password_env
    if password_env is not None and password_env not in os.environ:
        raise ConfigError(f"state: the environment variable {password_env} is not set.")
    if config.state.ca_file is not None and not config.state.ca_file.is_file():
        raise ConfigError(f"state: there is no file {config.state.ca_file}.")


def _check_memory(config: GatewayConfig, summaries: Sequence[ModelSummary]) -> None:
    """Weights and KV of engines without a GPU against the whole memory; engines check what is free when they load."""
    needed = 0
    for model, summary in zip(config.models, summaries, strict=True):
        if isinstance(model.engine, LocalEngineConfig) and model.actor.num_gpus == 0:
            needed += model.num_replicas * (summary.weight_bytes + (model.engine.kv_cache_bytes or _DEFAULT_KV_BYTES))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        sizes = f"{needed / _GIB:.1f} GiB, but this machine has {total / _GIB:.1f} GiB"
        raise ConfigError(f"The models' weights and KV caches need {sizes}.")


def _check_reservations(config: GatewayConfig) -> None:
    """Serve waits forever for CPUs and GPUs that Ray does not have."""
    parts = [(model.actor, model.num_replicas) for model in config.models]
    parts.append((config.ingress.actor, config.ingress.num_replicas))
    cpus = sum(actor.num_cpus * count for actor, count in parts)
    gpus = sum(actor.num_gpus * count for actor, count in parts)
    num_cpus = os.cpu_count() or 1
    if cpus > num_cpus:
        raise ConfigError(
            f"The configuration reserves {cpus:g} CPUs, this machine has {num_cpus}; lower actor.num_cpus."
        )
    if gpus > 0 and gpus > _num_gpus():
        raise ConfigError(f"The configuration reserves {gpus:g} GPUs, but this machine has {_num_gpus()}.")


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
