"""Stages timed on this machine: a few real steps of each, for `gowide plan --measure`."""

from __future__ import annotations

from gowide_dist.insight.assumed import this_machines_cores
from gowide_dist.launch.profile import Profile, Settings
from gowide_dist.prepare import check_data
from gowide_dist.progress import say
from gowide_dist.recipe import Recipe
from gowide_dist.steps import run_steps
from gowide_dist.train.costs import stage_cost


def measured_cores(recipe: Recipe, num_processes: int) -> Profile:
    """`this_machines_cores`, for each stage at the speed that a few steps of it reach, with the loading of their data.

    Starting the processes counts for the first stage; beginning and ending a stage, for each. Raises
    UserError if the data does not fit or a network cannot be trained.
    """
    recipe, _ = check_data(recipe)
    assert recipe.data.classes is not None, "a checked recipe"
    profile = this_machines_cores(num_processes)
    stages: dict[str, Settings] = {}
    for key, instance in recipe.instances.items():
        if instance.stage.epochs:
            times = run_steps(recipe, [key], num_processes)
            say(f"{key}: {times.step_s:.4f} s a step, {times.data_wait:.0%} of it waiting for data")
            macs = stage_cost(instance, recipe, recipe.data.classes).macs.total
            measured = {
                "tflops": 2 * recipe.batch_size * macs / num_processes / times.step_s / 1e12,
                "efficiency": 1.0,
                "images_per_s_per_cpu": 1e12,  # decoding is part of the measured step
                "start_s": times.fixed_s + (0.0 if stages else times.start_s),
            }
            assert profile.device is not None
            stages[key] = Settings(device=profile.device.model_copy(update=measured))
    return profile.model_copy(update={"stages": stages})
