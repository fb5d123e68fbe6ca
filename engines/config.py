"""Configuration of the engines: what an operator may write. Frozen, unknown keys forbidden, units in the names."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class _DrafterConfig(_Config):
    max_draft_tokens: int = Field(default=16, ge=1, le=64, description="most drafts for one sequence in one step")
    draft_length: Literal["adaptive"] | Annotated[int, Field(ge=0, le=64, strict=True)] = Field(
        default="adaptive", description="adaptive: as many as pay, none when none do; a number: always that many"
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if isinstance(self.draft_length, int) and self.draft_length > self.max_draft_tokens:
            raise ValueError(f"draft_length {self.draft_length} is above max_draft_tokens {self.max_draft_tokens}")
        return self


class NoDrafterConfig(_Config):
    """Plain decoding."""

    kind: Literal["none"] = "none"


class NgramDrafterConfig(_DrafterConfig):
    """Looks up the newest tokens in the prompt and the output."""

    kind: Literal["ngram"] = "ngram"


class SuffixDrafterConfig(_DrafterConfig):
    """Looks up the newest tokens in earlier outputs of the same tenant, that is of the same `cache_salt`."""

    kind: Literal["suffix"] = "suffix"
    max_history_tokens: int = Field(
        default=200_000, ge=1024, le=2**24, description="tokens of outputs remembered, over all tenants"
    )
    share_unsalted: bool = Field(
        default=False,
        description="requests without a cache_salt learn from each other; who may send logit_bias can then guess at "
        "others' outputs token by token",
    )


class PredictionDrafterConfig(_DrafterConfig):
    """Follows the prediction that came with the request."""

    kind: Literal["prediction"] = "prediction"


class ModelDrafterConfig(_DrafterConfig):
    """A small model with the target's vocabulary."""

    kind: Literal["model"] = "model"
    model: str = Field(description="as the target's: a folder or a hub id")
    revision: str | None = Field(default=None, description="hub revision")


class AutoDrafterConfig(_DrafterConfig):
    """All of them: what costs nothing first, the model (if one is named) where that has nothing good."""

    kind: Literal["auto"] = "auto"
    model: str | None = Field(default=None, description="a draft model, as the target's: a folder or a hub id")
    revision: str | None = Field(default=None, description="hub revision")
    max_history_tokens: int = Field(default=200_000, ge=1024, le=2**24, description="as for suffix")
    share_unsalted: bool = Field(default=False, description="as for suffix")

    @model_validator(mode="after")
    def _check_revision(self) -> AutoDrafterConfig:
        if self.revision is not None and self.model is None:
            raise ValueError("revision without a model")
        return self


DrafterConfig = Annotated[
    NoDrafterConfig
    | NgramDrafterConfig
    | SuffixDrafterConfig
    | PredictionDrafterConfig
    | ModelDrafterConfig
    | AutoDrafterConfig,
    Field(discriminator="kind"),
]


class LocalEngineConfig(_Config):
    """Our own paged engine over a transformers causal language model."""

    kind: Literal["local"] = "local"
    model: str = Field(
        description="a folder in Hugging Face format (a path, tried from the installation as well) or a hub id"
    )
    revision: str | None = Field(default=None, description="hub revision")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own"
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        default="none",
        description="of the linear layers, at load: int8, or int4 in groups of 32 with an int8 output layer; "
        "activations are int8 in both. On a GPU int4 saves memory, no time. A checkpoint that is quantized already "
        "stays as it is",
    )
    attention_backend: Literal["auto", "flash", "native", "reference", "torch", "triton"] = Field(
        default="auto",
        description="auto: the fastest measured here; triton, flash (needs flash-attn): for GPUs, not yet measured",
    )
    cuda_graphs: bool = Field(
        default=False,
        description="record decode and verification once per size and replay them; for attention_backend: triton, "
        "not yet measured",
    )
    block_size: int = Field(default=16, ge=1, le=512, description="tokens per KV block")
    kv_cache_bytes: int | None = Field(
        default=None, gt=0, description="KV memory in bytes; None: 1 GiB on CPU, memory_fraction on GPU"
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="auto: the model's; int8: about half of bfloat16's memory, with a scale for each head of a token",
    )
    memory_fraction: float = Field(
        default=0.9, gt=0.0, le=1.0, description="share of GPU memory for weights, activations and KV; unused on CPU"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="tokens of prompt plus completion; None: the model's own, if the KV cache holds it",
    )
    max_num_seqs: int = Field(default=64, ge=1, description="most sequences in one step")
    max_num_batched_tokens: int = Field(default=2048, ge=1, description="token budget of one step")
    max_num_waiting: int = Field(default=1024, ge=0, description="bound of the queue, in requests")
    priority_step_s: float = Field(
        default=30.0, ge=0.0, description="one priority level is worth so many seconds of waiting, so none starves"
    )
    enable_prefix_caching: bool = Field(default=True, description="reuse KV blocks of equal prefixes")
    num_threads: int | None = Field(default=None, ge=1, description="torch's CPU threads; None: torch's choice")
    parity_probe: bool = Field(
        default=True, description="compare paged and eager output at load; only a model known to pass may skip it"
    )
    optimize: bool = Field(
        default=True, description="on CPU: let compiled kernels do what they do faster than torch, where they are built"
    )
    drafter: DrafterConfig = Field(
        default=AutoDrafterConfig(), description="speculative decoding: who guesses ahead; the output stays the same"
    )
    costs_file: str | None = Field(
        default=None,
        description="where measured step costs outlive the process; None: below ~/.cache/outrider; empty: nowhere",
    )


class RemoteEngineConfig(_Config):
    """Any OpenAI-compatible server: vLLM, TGI, TensorRT-LLM, llama.cpp, a hosted API."""

    kind: Literal["remote"] = "remote"
    base_url: str = Field(pattern=r"^https?://", description="up to and including /v1")
    model: str = Field(description="the model's name at that server")
    api_key_env: str | None = Field(default=None, description="name of the environment variable that holds the key")
    accepts_token_ids: bool = Field(default=False, description="its /completions takes token ids (vLLM does)")
    max_model_len: int | None = Field(default=None, ge=2, description="tokens; None: unknown")
    connect_timeout_s: float = Field(default=5.0, gt=0)
    read_timeout_s: float = Field(default=120.0, gt=0, description="longest silence inside a stream")
    max_connections: int = Field(default=256, ge=1)


class EchoEngineConfig(_Config):
    """A deterministic fake: repeats the prompt. For tests and for trying a gateway without a model."""

    kind: Literal["echo"] = "echo"
    model: str = Field(default="echo", description="a folder with a tokenizer, or 'echo' for one token per byte")
    max_model_len: int = Field(default=4096, ge=2, description="tokens")
    token_delay_s: float = Field(default=0.0, ge=0.0, description="pause before each token")
    max_num_seqs: int = Field(default=64, ge=1)


EngineConfig = Annotated[LocalEngineConfig | RemoteEngineConfig | EchoEngineConfig, Field(discriminator="kind")]
