"""A resumable training run: one model, one loss, one schedule."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

from demo.recipe import Schedule
from demo.stream import WindowOrder

# Loss of a step from the indices and length of its aligned windows: a scalar with gradient.
StepLoss = Callable[[list[int], int], torch.Tensor]

LOG_EVERY_STEPS = 20
MOST_STEP_SECONDS = 60.0  # a longer step was suspended; its time is not training time


@dataclass(slots=True)
class Progressed:
    """How far a run has come; `seconds` is time spent in steps, suspensions left out."""

    step: int = 0
    seconds: float = 0.0


class TrainingRun:
    """Trains one model with AdamW and keeps a checkpoint from which the run continues exactly.

    Owns the optimizer; modifies the model's weights in place.
    """

    def __init__(
        self, model: LlamaForCausalLM, loss: StepLoss, num_tokens: int, schedule: Schedule, seed: int, checkpoint: Path
    ) -> None:
        self._model = model
        self._loss = loss
        self._num_tokens = num_tokens
        self._schedule = schedule
        self._seed = seed
        self._checkpoint = checkpoint
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in model.parameters() if weight.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=schedule.peak_lr, betas=(0.9, 0.97))
        self._orders: dict[int, WindowOrder] = {}
        self.done = Progressed()
        if checkpoint.exists():
            self._load()

    def run(self, until_step: int | None = None, save_every_s: float = 60.0) -> None:
        """Trains from the last checkpoint to `until_step` (default: the schedule's end) and saves at the end."""
        last = min(until_step or self._schedule.num_steps, self._schedule.num_steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        started = self.done.step
        self._model.train()
        saved_at = time.monotonic()
        with Progress(*columns, TimeRemainingColumn(), refresh_per_second=1) as progress:
            task = progress.add_task(self._checkpoint.stem, total=last, completed=started)
            while self.done.step < last:
                loss = self._step()
                progress.update(task, completed=self.done.step)
                if self.done.step % LOG_EVERY_STEPS == 0:
                    progress.console.print(
                        f"{self._checkpoint.stem} step {self.done.step}/{self._schedule.num_steps} "
                        f"loss {loss.item():.3f} lr {self._schedule.lr(self.done.step - 1):.2e} "
                        f"{self.done.seconds / self.done.step * 1000:.0f} ms/step"
                    )
                if time.monotonic() - saved_at > save_every_s:
                    self.save()
                    saved_at = time.monotonic()
        if self.done.step > started:
            self.save()
        self._model.eval()  # type: ignore[no-untyped-call]

    def _step(self) -> torch.Tensor:
        start = time.monotonic()
        schedule, step = self._schedule, self.done.step
        length = schedule.window(step)
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        loss = self._loss(self._order(length).batch(step), length)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), schedule.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        self.done.step += 1
        self.done.seconds += seconds if seconds < MOST_STEP_SECONDS else 0.0
        return loss.detach()

    def _order(self, length: int) -> WindowOrder:
        if length not in self._orders:
            batch_size = max(1, self._schedule.batch_tokens // length)
            self._orders[length] = WindowOrder(self._num_tokens // length, batch_size, self._seed)
        return self._orders[length]

    def save(self) -> None:
        """Replaces the checkpoint atomically: a run killed at any moment leaves a whole one."""
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self._checkpoint.with_suffix(".partial")
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "step": self.done.step,
            "seconds": self.done.seconds,
        }
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self.done = Progressed(state["step"], state["seconds"])
