"""From a checkpoint to a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file

from engines.checkpoint_formats import GGUF_SUFFIX
from engines.config import LocalEngineConfig
from engines.errors import ModelLoadError
from engines.loading import load_model, resolve_source, weight_bytes
from engines.quant.checkpoint import checkpoint_bytes, copy_companions, save_quantized
from engines.quant.memory import planned_bytes
from engines.quant.model import quantize
from engines.quant.scheme import DEFAULT_GROUP_SIZE, Scheme
from engines.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done. Sizes in bytes: of weight files on disk, and of the model in memory, as planned and as it is."""

    num_layers: int
    disk_before: int
    disk_after: int
    memory_before: int
    memory_after: int
    memory_planned: int
    companions: tuple[str, ...]


def convert(
    model: str,
    folder: Path,
    scheme: Scheme,
    *,
    revision: str | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    keep_head: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write `model`, a folder or hub id, to `folder`, quantized, with its tokenizer, templates and generation config.

    `folder` must be new or empty. `keep_head` leaves the output layer as it is, for readers that expect that. Raises
    ModelLoadError: folder in use, model already quantized, or anything that would keep it from being served.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelLoadError(f"{folder} is there already and is not an empty folder.")
    if model.endswith(GGUF_SUFFIX):
        raise ModelLoadError(f"{model!r} is a GGUF file, quantized or made to be; start from the original weights.")
    loaded = load_model(LocalEngineConfig(model=model, revision=revision, device="cpu"))
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise ModelLoadError(f"{model!r} is quantized already; start from the original weights.")
    planned = planned_bytes(loaded.config, scheme, group_size=group_size, keep_head=keep_head)
    source = _folder_of(model, revision)
    num_layers = quantize(loaded.model, scheme, group_size=group_size, keep_head=keep_head, progress=progress)
    if not num_layers:
        raise ModelLoadError(f"{model!r} has no linear layers to quantize.")
    try:
        save_quantized(loaded.model, folder)
        companions = copy_companions(source, folder)
    except OSError as error:
        raise ModelLoadError(f"{folder} cannot be written: {error}") from error
    return Conversion(
        num_layers=num_layers,
        disk_before=checkpoint_bytes(source),
        disk_after=checkpoint_bytes(folder),
        memory_before=loaded.weight_bytes,
        memory_after=weight_bytes(loaded.model),
        memory_planned=planned,
        companions=tuple(companions),
    )


def _folder_of(model: str, revision: str | None) -> Path:
    """Where the files of a model are that has been loaded; those of its tokenizer are fetched with it."""
    source = resolve_source(model)
    Tokenizer.load(source, revision)
    config = cached_file(source, "config.json", revision=revision)
    assert config is not None, "cached_file raises for what does not exist"
    return Path(config).parent
