"""Trains the demo fleet: `python -m demo.train --out demo/models [--stage tokenizer|target|mid|draft|report|all]`.

Stages build on one another: the tokenizer and token streams, the target, then the two models that imitate it, then the
measurements. Each is kept under the work folder and continued from there, so a killed run costs at most a minute.
"""

import argparse
from pathlib import Path

import torch

from demo.recipe import ModelName, Recipe
from demo.report import write_report
from demo.workshop import Workshop

DEFAULT_WORK = Path.home() / ".cache" / "outrider" / "demo-train"
STAGES = ("tokenizer", "target", "mid", "draft", "report")
MODELS: tuple[ModelName, ...] = ("target", "mid", "draft")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/models"), help="folder of the exported checkpoints")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder of data and resumable checkpoints")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--steps", type=int, help="length of the schedules, instead of the recipe's")
    parser.add_argument("--until-step", type=int, help="stop and export here, short of a schedule's end")
    parser.add_argument("--sampled-rows", type=int, help="rows that the target writes for the smaller models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile (it needs a C++ compiler)")
    return parser.parse_args()


def adjusted(recipe: Recipe, steps: int | None, sampled_rows: int | None) -> Recipe:
    """The recipe with the command line's lengths in place of its own; validated again."""
    values = recipe.model_dump()
    if steps is not None:
        for schedule in values["schedules"].values():
            schedule["num_steps"] = steps
    if sampled_rows is not None:
        values["distillation"]["num_sampled_rows"] = sampled_rows
    return Recipe.model_validate(values)


def main() -> None:
    """Runs the stages asked for."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    recipe = adjusted(Recipe(), arguments.steps, arguments.sampled_rows)
    workshop = Workshop(recipe, arguments.work, arguments.out, compiled=not arguments.no_compile)
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    workshop.data()
    for name in MODELS:
        if name in stages:
            workshop.train(name, arguments.until_step)
    if "report" in stages:
        write_report(workshop, arguments.out.parent / "README.md")


if __name__ == "__main__":
    main()
