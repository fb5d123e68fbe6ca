"""One work folder and one output folder: what the stages read and leave there."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.data import Streams, make_data
from demo.losses import distillation_loss, text_loss
from demo.model import build_model, device, save_model
from demo.quantize import quantize_folder
from demo.recipe import ModelName, Recipe
from demo.stream import TokenStream, concatenate
from demo.teacher import Teacher, fingerprint, write_rows
from demo.training import Progressed, StepLoss, TrainingRun

PROMPT_TOKENS = 32


class Workshop:
    """Makes the tokenizer and the three models, each from what earlier stages left.

    `work` holds data, teacher probabilities and resumable checkpoints; `out` the exported folders, one a model.
    """

    def __init__(self, recipe: Recipe, work: Path, out: Path, compiled: bool) -> None:
        self.recipe = recipe
        self.out = out
        self._work = work
        self._compiled = compiled
        self._data: tuple[PreTrainedTokenizerFast, Streams] | None = None

    def data(self) -> tuple[PreTrainedTokenizerFast, Streams]:
        """Tokenizer and token streams, built on first use."""
        if self._data is None:
            self._data = make_data(self.recipe, self._work / "data")
        return self._data

    def train(self, name: ModelName, until_step: int | None = None) -> None:
        """Trains one model, continuing from its checkpoint, and exports it; the mid-size model as int8."""
        tokenizer, streams = self.data()
        torch.manual_seed(self.recipe.seed)
        model = build_model(self.recipe.shapes[name], self.recipe, tokenizer.eos_token_id)
        model = model.to(device())  # type: ignore[arg-type]
        loss: StepLoss
        if name == "target":
            stream = streams.train
            loss = text_loss(model, stream, self._compiled)
        else:
            stream, teacher = self._taught_stream()
            loss = distillation_loss(model, stream, teacher, self.recipe.distillation.teacher_weight, self._compiled)
        schedule = self.recipe.schedules[name]
        # Orders of their own: two models trained side by side then fill different rows of the teacher's arrays.
        seed = self.recipe.seed + list(self.recipe.shapes).index(name)
        run = TrainingRun(model, loss, len(stream.tokens), schedule, seed, self.checkpoint(name))
        run.run(until_step)
        save_model(model, tokenizer, self.out / name)
        if name == "mid":
            quantize_folder(self.out / name)

    def checkpoint(self, name: ModelName) -> Path:
        """Where a model's resumable state is kept."""
        return self._work / f"{name}.pt"

    def progressed(self, name: ModelName) -> Progressed:
        """How many steps, and how long, a model has been trained."""
        state = torch.load(self.checkpoint(name), weights_only=True)
        return Progressed(state["step"], state["seconds"])

    def exported(self, name: ModelName) -> LlamaForCausalLM:
        """An exported model as its users load it, in fp32."""
        model = AutoModelForCausalLM.from_pretrained(self.out / name, dtype=torch.float32)
        assert isinstance(model, LlamaForCausalLM)
        return model.to(device()).eval()  # type: ignore[no-any-return, arg-type]

    def _taught_stream(self) -> tuple[TokenStream, Teacher]:
        """The training text with text of the target's own, and the target's probabilities over both."""
        distillation = self.recipe.distillation
        target = self.exported("target")
        _, streams = self.data()
        folder = self._work / f"teacher-{fingerprint(target)[:12]}"
        sampled_path = folder / f"sampled-{distillation.num_sampled_rows}.npy"
        stream = streams.train
        if distillation.num_sampled_rows:
            if not sampled_path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                torch.manual_seed(self.recipe.seed)
                write_rows(target, self._prompts(), distillation.sampling_temperature).save(sampled_path)
            stream = concatenate([stream, TokenStream.load(sampled_path)])
        return stream, Teacher(target, stream, distillation.teacher_top_k, folder, self._compiled)

    def _prompts(self) -> torch.Tensor:
        """Beginnings for the target to continue, two a row: `[2 * num_sampled_rows, PROMPT_TOKENS]`.

        They are spread evenly over the training rows, so text and chat get their shares.
        """
        _, streams = self.data()
        count = 2 * self.recipe.distillation.num_sampled_rows
        windows = streams.train.num_windows(PROMPT_TOKENS)
        return streams.train.windows(PROMPT_TOKENS, [windows * index // count for index in range(count)])
