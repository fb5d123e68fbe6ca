"""The numbers of the demo fleet: shapes of the models and how each is trained."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ModelName = Literal["target", "mid", "draft"]


class Shape(BaseModel):
    """Sizes of one Llama-architecture model; embeddings are tied and heads are 64 wide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="features between the up and down projections")
    num_heads: int = Field(gt=0, description="query heads")
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(default=64, gt=0)


class Schedule(BaseModel):
    """How long and how fast one model learns: linear warm-up, a plateau, then linear decay to zero (WSD).

    The plateau does not depend on `num_steps`, so that a run may be stopped and continued with another length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(ge=1)
    peak_lr: float = Field(gt=0)
    warmup_steps: int = Field(default=60, ge=1)
    decay_share: float = Field(default=0.25, gt=0, le=1, description="share of the steps spent decaying")
    batch_tokens: int = Field(default=2048, ge=2, description="tokens in one optimizer step")
    window_tokens: int = Field(default=512, ge=2, description="tokens of context during most of the run")
    long_share: float = Field(default=0.08, ge=0, lt=1, description="share of the steps, at the end, in long windows")
    long_window_tokens: int = Field(default=2048, ge=2)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        decay_steps = max(1, round(self.decay_share * self.num_steps))
        warmup = (step + 1) / self.warmup_steps
        decay = (self.num_steps - step) / decay_steps
        return self.peak_lr * min(1.0, warmup, decay)

    def window(self, step: int) -> int:
        """Tokens of context in a step's windows."""
        is_long = step >= self.num_steps - round(self.long_share * self.num_steps)
        return self.long_window_tokens if is_long else self.window_tokens


class Distillation(BaseModel):
    """How a smaller model learns from the target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_weight: float = Field(default=0.8, ge=0, le=1, description="weight of KL to the target; the rest is CE")
    teacher_top_k: int = Field(default=32, ge=1, description="target probabilities kept a position; the tail is lumped")
    num_sampled_rows: int = Field(default=128, ge=0, description="rows of text that the target writes itself")
    sampling_temperature: float = Field(default=0.8, gt=0)


class Recipe(BaseModel):
    """Everything that decides the demo checkpoints, apart from the Python version and the hardware."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 20
    vocab_size: int = Field(default=8192, ge=512, le=65536, description="specials included")
    max_positions: int = Field(default=2048, ge=16)
    held_out_share: float = Field(default=0.04, gt=0, lt=1, description="share of top-level modules never trained on")
    shapes: dict[ModelName, Shape] = {
        "target": Shape(hidden_size=384, num_layers=5, intermediate_size=1024, num_heads=6, num_kv_heads=2),
        "mid": Shape(hidden_size=256, num_layers=4, intermediate_size=704, num_heads=4, num_kv_heads=2),
        "draft": Shape(hidden_size=128, num_layers=3, intermediate_size=352, num_heads=2, num_kv_heads=1),
    }
    schedules: dict[ModelName, Schedule] = {
        "target": Schedule(num_steps=3800, peak_lr=2e-3),
        "mid": Schedule(num_steps=1900, peak_lr=3e-3),
        "draft": Schedule(num_steps=1900, peak_lr=4e-3),
    }
    distillation: Distillation = Distillation()
