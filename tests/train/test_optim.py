import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gowide_dist.stages import LabelsStage, Optim
from gowide_dist.timeline import Batching, Timeline
from gowide_dist.train.optim import MovingAverage, Optimizer, average_decay, learning_rate

OPTIM = Optim(lr=0.1)


def rate(step, total, schedule, num_phases=1):
    timeline = Timeline(Batching(8), steps_per_epoch=10, epochs=total // 10, num_phases=num_phases)
    stage = {"train": ["thin"], "objective": "labels", "epochs": timeline.epochs, "optim": OPTIM, "schedule": schedule}
    return learning_rate(step, timeline, LabelsStage.model_validate(stage))


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
    timeline = Timeline(Batching(8), steps_per_epoch=10, epochs=4, num_phases=3)
    assert [timeline.phase(index) for index in range(3)] == [range(0, 13), range(13, 26), range(26, 40)]
    for index in range(3):
        assert rate(timeline.phase(index).start, 40, "cosine", num_phases=3) == 0.1


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 8))
def test_phases_cover_every_step_once(steps_per_epoch, epochs, num_phases):
    timeline = Timeline(Batching(8), steps_per_epoch, epochs, num_phases)
    steps = [step for index in range(num_phases) for step in timeline.phase(index)]
    assert steps == list(range(timeline.total_steps))


def test_linear_by_hand():
    assert rate(25, 100, "linear") == pytest.approx(0.075)
    assert rate(55, 100, {"decay": "linear", "warmup_epochs": 1}) == pytest.approx(0.05)


def optimised(optim, gradients, weight=2.0, scaled=False):
    """Weight after steps at rate 0.1 with these gradients; one weight that is a matrix, one that is a bias."""
    module = torch.nn.Linear(1, 1)
    frozen = torch.nn.Linear(1, 1).requires_grad_(False)
    torch.nn.init.constant_(module.weight, weight)
    torch.nn.init.constant_(module.bias, weight)
    optimizer = Optimizer(torch.nn.ModuleList([module, frozen]), Optim(lr=0.1, **optim), scaled)
    for gradient in gradients:
        optimizer.backward(gradient * (module.weight.sum() + module.bias.sum()))
        optimizer.step(0.1)
    return module.weight.item(), module.bias.item()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    optim = {"momentum": 0.5, "weight_decay": 0.25, "nesterov": nesterov}
    weight, velocity = 2.0, 0.0
    for _ in range(3):  # gradient 1 + 0.25 weight; the velocity is halved, then the gradient added
        gradient = 1 + 0.25 * weight
        velocity = 0.5 * velocity + gradient
        weight -= 0.1 * (gradient + 0.5 * velocity if nesterov else velocity)
    assert optimised(optim, [1.0] * 3) == (pytest.approx(weight), pytest.approx(weight))


def test_decay_of_norms_and_biases_is_a_choice():
    weight, bias = optimised({"weight_decay": 0.25, "decay_norms": False, "momentum": 0}, [1.0])
    assert weight == pytest.approx(2 - 0.1 * 1.5)
    assert bias == pytest.approx(2 - 0.1)


def test_the_whole_gradient_is_clipped():
    weight, bias = optimised({"clip_norm": 1.0, "momentum": 0}, [3.0])  # norm 3 sqrt(2)
    assert weight == bias == pytest.approx(2 - 0.1 / 2**0.5)
    assert optimised({"clip_norm": 10.0, "momentum": 0}, [3.0])[0] == pytest.approx(2 - 0.3)


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 1.0}])
def test_loss_scaling_changes_nothing_but_leaves_out_overflows(clip):
    optim = {"momentum": 0.5, **clip}
    assert optimised(optim, [1.0, 2.0], scaled=True) == pytest.approx(optimised(optim, [1.0, 2.0]))
    assert optimised(optim, [1.0, float("inf"), 2.0], scaled=True) == pytest.approx(optimised(optim, [1.0, 2.0]))


def test_an_overflow_in_the_first_step_leaves_no_trace():
    """Fused SGD then keeps a momentum that it has not filled: here made visible by filling it with NaN."""
    torch.use_deterministic_algorithms(True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        optim = {"momentum": 0.9}
        assert optimised(optim, [float("inf"), 1.0, 2.0], scaled=True) == pytest.approx(optimised(optim, [1.0, 2.0]))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_moving_average_by_hand():
    module = torch.nn.BatchNorm1d(1, affine=False)
    average = MovingAverage(module)
    expected = 0.0
    for value in (4.0, 8.0):
        module.running_mean.fill_(value)
        average.update(0.75)
        expected = 0.75 * expected + 0.25 * value
    with average.applied():
        assert module.running_mean.item() == pytest.approx(expected)
    assert module.running_mean.item() == 8.0
    again = MovingAverage(module)
    again.load_state_dict(average.state_dict())
    with again.applied():
        assert module.running_mean.item() == pytest.approx(expected)


def test_the_average_warms_up_with_every_phase():
    """timm's ModelEmaV3 with its power 3/4: 1 - (1 + n)^(-3/4) after n steps, at most the recipe's decay."""
    timeline = Timeline(Batching(8), steps_per_epoch=10, epochs=20, num_phases=2)
    by_hand = {0: 0.0, 15: 1 - 1 / 8, 21: 0.9, 80: 0.9, 99: 0.9, 100: 0.0, 115: 1 - 1 / 8, 199: 0.9}
    assert {step: average_decay(step, timeline, 0.9) for step in by_hand} == pytest.approx(by_hand)
    long = Timeline(Batching(8), steps_per_epoch=10_000, epochs=2)
    assert average_decay(9_999, long, 0.9999) == pytest.approx(0.999) and average_decay(10_000, long, 0.999) == 0.999


def test_after_a_short_stage_the_average_holds_nothing_of_its_start():
    """Without a warm-up 91 % of it would be the random start: 0.9999^936."""
    timeline = Timeline(Batching(8), steps_per_epoch=312, epochs=3)
    module = torch.nn.BatchNorm1d(1, affine=False)
    module.running_mean.fill_(1.0)
    average = MovingAverage(module)
    module.running_mean.fill_(0.0)
    for step in range(timeline.total_steps):
        average.update(average_decay(step, timeline, 0.9999))
    with average.applied():
        assert module.running_mean.item() == 0
