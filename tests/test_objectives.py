import math

import pytest
import torch
import torch.nn.functional as F

from gowide_dist import build_network
from gowide_dist.networks import Teacher
from gowide_dist.objectives import Blocks, Kl, Labels, accuracy, block_mse, kl_divergence

THIN = {"block": "bottleneck", "depths": [1, 1, 1], "base": 8, "width": 0.5, "stem": "strided"}


@pytest.fixture
def student():
    torch.manual_seed(1)
    return build_network(THIN, 10)


@pytest.fixture
def teacher():
    torch.manual_seed(2)
    return Teacher(build_network({**THIN, "width": 4}, 10))


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))


def test_kl_by_hand():
    # teacher (3/4, 1/4) at T = 1, student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher, 1.0).item() == pytest.approx(by_hand, rel=1e-5)
    # at T = 2 the logit is ln sqrt(3): (sqrt(3), 1) / (1 + sqrt(3)), and T^2 = 4
    p = math.sqrt(3) / (1 + math.sqrt(3))
    by_hand = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert kl_divergence(student, teacher, 2.0).item() == pytest.approx(by_hand, rel=1e-5)


def test_mse_by_hand():
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[0.0, 0.0]], [[0.0, 2.0]]]])  # 2 samples, 2 channels, 1x2
    teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 4.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    assert block_mse(student, teacher).tolist() == [(4 + 9) / 4, 4 / 4]


def test_accuracy_by_hand():
    logits = torch.arange(7.0).repeat(3, 1)  # best class 6, five best 2 to 6
    assert accuracy(logits, torch.tensor([6, 2, 1])) == {
        "top1": pytest.approx([1, 0, 0]),
        "top5": pytest.approx([1, 1, 0]),
    }
    assert accuracy(logits[:, :3], torch.tensor([0, 1, 2]))["top5"].tolist() == [1, 1, 1]


def test_labels_is_cross_entropy(student, batch):
    images, labels = batch
    objective = Labels(student)
    assert torch.allclose(objective(images, labels)["loss"], F.cross_entropy(student(images)[0], labels))


def test_kl_trains_the_student_alone(student, teacher, batch):
    objective = Kl(student, teacher, temperature=4.0)
    objective(*batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.parameters()}
    assert set(objective.state_dict()) == {f"student.{name}" for name in student.state_dict()}


def test_bottom_up_trains_one_block_on_frozen_ones(student, teacher, batch):
    objective = Blocks(student, teacher)
    ran = []
    for index in range(3):
        student.layer(index).register_forward_hook(lambda *_, index=index: ran.append(index))
    for phase in range(3):
        objective.begin_phase(phase)
        objective.train()
        objective.zero_grad()
        ran.clear()
        before = {name: value.clone() for name, value in student.state_dict().items()}
        losses = objective(*batch)
        losses["loss"].backward()
        assert ran == list(range(phase + 1))
        trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        mine = ("conv1.", "bn1.", "layer1.") if phase == 0 else (f"layer{phase + 1}.",)
        assert trained == {name for name, _ in student.named_parameters() if name.startswith(mine)}
        moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if name.startswith(mine) and ("running" in name or "tracked" in name)}
        objective.eval()
        evaluated = objective.evaluate(*batch)
        target = teacher.blocks(batch[0], phase + 1)[-1]
        mse = block_mse(student(batch[0])[1][phase], target)
        assert torch.allclose(evaluated[f"mse_block{phase + 1}"], mse)


def test_bottom_up_never_runs_the_teacher_above_the_block(student, batch):
    network = build_network({**THIN, "width": 4}, 10)
    ran = []
    for index in range(3):
        network.layer(index).register_forward_hook(lambda *_, index=index: ran.append(index))
    objective = Blocks(student, Teacher(network))
    objective.begin_phase(1)
    objective.train()(*batch)
    assert ran == [0, 1]


def test_imitation_takes_the_teachers_classifier(student, teacher):
    assert not torch.equal(student.fc.weight, teacher.classifier["weight"])
    Blocks(student, teacher)
    assert torch.equal(student.fc.weight, teacher.classifier["weight"])
    assert torch.equal(student.fc.bias, teacher.classifier["bias"])
