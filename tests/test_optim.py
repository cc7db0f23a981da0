import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gowide_dist.optim import Timeline, build_optimizer, learning_rate
from gowide_dist.recipe import Optim, Schedule

OPTIM = Optim(lr=0.1)


def rate(step, total, schedule, steps_per_epoch=10):
    return learning_rate(step, range(total), steps_per_epoch, OPTIM, Schedule.model_validate(schedule))


def test_the_papers_schedule_by_hand():
    schedule = {"warmup_epochs": 5, "milestones": [30, 60, 80]}
    by_hand = {0: 0.0, 25: 0.05, 49: 0.098, 50: 0.1, 299: 0.1, 300: 0.01, 600: 0.001, 799: 0.001, 800: 0.0001}
    assert {step: pytest.approx(rate(step, 900, schedule)) for step in by_hand} == by_hand


def test_cosine_by_hand():
    assert rate(0, 100, "cosine") == pytest.approx(0.1)
    assert rate(50, 100, "cosine") == pytest.approx(0.05)
    assert rate(99, 100, "cosine") == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.99)))
    assert rate(55, 100, {"decay": "cosine", "warmup_epochs": 1}) == pytest.approx(0.05)
    assert rate(73, 100, "constant") == 0.1


def test_every_phase_has_a_schedule_of_its_own():
    timeline = Timeline(steps_per_epoch=10, epochs=4, num_phases=3)
    assert [timeline.phase(index) for index in range(3)] == [range(0, 13), range(13, 26), range(26, 40)]
    for index in range(3):
        steps = timeline.phase(index)
        assert learning_rate(steps.start, steps, 10, OPTIM, Schedule()) == 0.1


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 8))
def test_phases_cover_every_step_once(steps_per_epoch, epochs, num_phases):
    timeline = Timeline(steps_per_epoch, epochs, num_phases)
    steps = [step for index in range(num_phases) for step in timeline.phase(index)]
    assert steps == list(range(timeline.total_steps))


def test_sgd_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    frozen = torch.nn.Linear(1, 1).requires_grad_(False)
    torch.nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(torch.nn.ModuleList([layer, frozen]), Optim(lr=0.1, momentum=0.5, weight_decay=0.25))
    # gradient 1 + 0.25 * weight; velocity is halved, then the gradient added
    weight, velocity = 2.0, 0.0
    for _ in range(3):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        velocity = 0.5 * velocity + 1 + 0.25 * weight
        weight -= 0.1 * velocity
    assert layer.weight.item() == pytest.approx(weight)
    assert len(optimizer.param_groups[0]["params"]) == 1
