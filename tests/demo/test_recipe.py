import pytest
from pydantic import ValidationError

from demo.recipe import Recipe, Schedule
from demo.train import adjusted

SCHEDULE = Schedule(num_steps=100, peak_lr=1.0, warmup_steps=10, decay_share=0.2, long_share=0.1)


def test_the_rate_warms_up_stays_and_decays() -> None:
    assert [SCHEDULE.lr(step) for step in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.05])


def test_the_plateau_does_not_depend_on_the_length() -> None:
    longer = SCHEDULE.model_copy(update={"num_steps": 1000})
    assert [longer.lr(step) for step in range(80)] == [SCHEDULE.lr(step) for step in range(80)]


def test_the_last_steps_see_long_windows() -> None:
    assert [SCHEDULE.window(step) for step in (0, 89, 90)] == [512, 512, 2048]


def test_the_recipe_is_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Recipe().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Recipe.model_validate({"sede": 1})


def test_the_command_lines_lengths_replace_the_recipes() -> None:
    recipe = adjusted(Recipe(), steps=7, sampled_rows=0)
    assert {schedule.num_steps for schedule in recipe.schedules.values()} == {7}
    assert recipe.distillation.num_sampled_rows == 0
    assert adjusted(Recipe(), steps=None, sampled_rows=None) == Recipe()
