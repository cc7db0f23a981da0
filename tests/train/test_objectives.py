import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gowide_dist import build_network
from gowide_dist.networks.teacher import Teacher
from gowide_dist.stages import BlocksStage, KlStage
from gowide_dist.train.losses import (
    MixedLabels,
    accuracy,
    balanced_weights,
    block_mse,
    cross_entropy,
    dist_over_batch,
    dist_over_classes,
    dkd,
    kl_divergence,
    z_scores,
)
from gowide_dist.train.objectives import Blocks, Kl, Labels
from gowide_dist.train.teacher_logits import compress

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


def blocks(student, teacher, **options):
    stage = {"train": ["thin"], "objective": "blocks", "teacher": "teacher", "epochs": 1, "optim": {"lr": 1}, **options}
    return Blocks(student, teacher, BlocksStage.model_validate(stage))


def kl(student, teacher, **options):
    stage = {"train": ["thin"], "objective": "kl", "teacher": "teacher", "epochs": 1, "optim": {"lr": 1}, **options}
    return Kl(student, teacher, KlStage.model_validate(stage))


def test_kl_by_hand():
    # teacher (3/4, 1/4) at T = 1, student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher, 1.0).item() == pytest.approx(by_hand, rel=1e-5)
    # at T = 2 the logit is ln sqrt(3): (sqrt(3), 1) / (1 + sqrt(3)), and T^2 = 4
    p = math.sqrt(3) / (1 + math.sqrt(3))
    by_hand = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert kl_divergence(student, teacher, 2.0).item() == pytest.approx(by_hand, rel=1e-5)


def test_dkd_by_hand():
    # teacher (1/2, 1/4, 1/4), student (1/3, 1/3, 1/3)
    teacher, student = torch.tensor([[math.log(2.0), 0.0, 0.0]] * 2), torch.zeros(2, 3)
    losses = dkd(student, teacher, torch.tensor([0, 1]), 1.0, target_weight=1.0, others_weight=8.0)
    # label 0: (1/2, 1/2) and (1/3, 2/3); among the others both are even
    assert losses[0].item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-5)
    # label 1: (1/4, 3/4) and (1/3, 2/3); among the others (2/3, 1/3) and (1/2, 1/2)
    target = 0.25 * math.log(0.75) + 0.75 * math.log(9 / 8)
    others = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert losses[1].item() == pytest.approx(target + 8 * others, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_sum_of_its_decoupled_parts(temperature):
    """KL = TCKD + (1 - p) NCKD, Zhao et al. 2022, and so are the gradients: p is the teacher's."""
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(16, 7).double().requires_grad_(), 5 * torch.randn(16, 7).double()
    labels = torch.randint(0, 7, (16,))
    tckd, nckd = (dkd(student, teacher, labels, temperature, *weights) for weights in ((1, 0), (0, 1)))
    p = F.softmax(teacher / temperature, dim=1)[range(16), labels].float()
    whole = kl_divergence(student, teacher, temperature)
    assert torch.allclose(tckd + (1 - p) * nckd, whole, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (tckd + (1 - p) * nckd, whole)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_dist_is_one_less_the_correlations_over_classes_and_over_the_batch():
    rng = np.random.default_rng(0)
    student, teacher = 2 * rng.standard_normal((6, 5)), 3 * rng.standard_normal((6, 5))
    own, target = (np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True) for logits in (student, teacher))
    over_classes = [4 * (1 - np.corrcoef(a, b)[0, 1]) for a, b in zip(own, target, strict=True)]
    over_batch = np.mean([4 * (1 - np.corrcoef(a, b)[0, 1]) for a, b in zip(own.T, target.T, strict=True)])
    pair = torch.tensor(student), torch.tensor(teacher)
    assert dist_over_classes(*pair, 2.0).tolist() == pytest.approx(over_classes, rel=1e-4)
    assert dist_over_batch(*pair, 2.0).item() == pytest.approx(over_batch, rel=1e-4)


def test_dist_asks_for_relations_not_for_values():
    """Probabilities that are stretched around even ones correlate perfectly, over classes and over the batch."""
    torch.manual_seed(0)
    teacher = torch.rand(6, 4).softmax(dim=1)
    student = 0.25 + 0.5 * (teacher - 0.25)
    assert dist_over_classes(student.log(), teacher.log(), 1.0).abs().max() < 1e-5
    assert dist_over_batch(student.log(), teacher.log(), 1.0).abs() < 1e-5
    assert kl_divergence(student.log(), teacher.log(), 1.0).min() > 1e-4


def test_z_scores_by_hand():
    # deviations of (1, 2, 3) with divisor 2: -1, 0, 1; of (0, 0, 3) the mean is 1 and the variance (1 + 1 + 4) / 2
    scores = z_scores(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]))
    root = math.sqrt(3)
    assert torch.allclose(scores, torch.tensor([[-1.0, 0.0, 1.0], [-1 / root, -1 / root, 2 / root]]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_compute_in_float32_and_survive_what_is_constant(dtype):
    """Equal logits have no deviation and no correlation: no loss or gradient may become NaN."""
    labels = torch.zeros(4, dtype=torch.long)
    for logits in (torch.zeros(4, 3), torch.tensor([[300.0, 0.0, -300.0]]).repeat(4, 1)):
        student, teacher = logits.to(dtype).requires_grad_(), logits.to(dtype)
        losses = [
            dkd(student, teacher, labels, 1.0, 1.0, 8.0),
            dist_over_classes(student, teacher, 1.0),
            dist_over_batch(student, teacher, 1.0),
            kl_divergence(z_scores(student), z_scores(teacher), 2.0),
        ]
        for loss in losses:
            assert loss.dtype == torch.float32
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert loss.isfinite().all() and gradient.isfinite().all()


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


def test_cross_entropy_by_hand():
    logits, label = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])  # probabilities 3/4 and 1/4
    assert cross_entropy(logits, label).item() == pytest.approx(math.log(4 / 3))
    # smoothing 0.2 over two classes: targets 0.9 and 0.1
    by_hand = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert cross_entropy(logits, label, smoothing=0.2).item() == pytest.approx(by_hand)


def test_weights_of_classes_by_hand():
    weights = balanced_weights(torch.tensor([6, 2, 0]))  # 8 images in 2 classes: 8 / (2 * 6), 8 / (2 * 2)
    assert weights.tolist() == pytest.approx([2 / 3, 2, 0])
    assert balanced_weights(torch.tensor([5, 5, 5])).tolist() == [1, 1, 1]
    logits, labels = torch.tensor([[math.log(3.0), 0.0, -99.0]] * 2), torch.tensor([0, 1])
    by_hand = [2 / 3 * math.log(4 / 3), 2 * math.log(4)]
    assert cross_entropy(logits, labels, class_weights=weights).tolist() == pytest.approx(by_hand, rel=1e-5)
    mixed = cross_entropy(logits, MixedLabels(labels, labels.flip(0), torch.tensor([0.75, 1.0])), 0.0, weights)
    assert mixed.tolist() == pytest.approx([0.75 * by_hand[0] + 0.25 * by_hand[1], by_hand[1]], rel=1e-5)


def test_classes_of_any_size_pull_alike():
    """Of 30 images of one class and 2 of another, on logits that say nothing: their gradients cancel."""
    labels = torch.tensor([0] * 30 + [1] * 2)
    bias = torch.zeros(2, requires_grad=True)
    weights = balanced_weights(torch.bincount(labels))
    cross_entropy(bias.expand(32, 2), labels, 0.1, weights).mean().backward()
    assert bias.grad.tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("objective", ["labels", "kl"])
def test_weights_of_classes_train_but_do_not_judge(student, teacher, batch, objective):
    images, labels = batch
    weights = balanced_weights(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    stage = KlStage.model_validate(
        {
            "train": "thin",
            "objective": "kl",
            "teacher": "teacher",
            "epochs": 1,
            "optim": {"lr": 1},
            "labels_weight": 0.4,
        }
    )
    build = {"labels": lambda *w: Labels(student, 0.1, *w), "kl": lambda *w: Kl(student, teacher, stage, *w)}[objective]
    weighted, plain = build(weights), build()
    losses = weighted(images, labels)
    assert losses["loss"] != plain(images, labels)["loss"]
    if objective == "kl":
        by_hand = (weights[labels] * F.cross_entropy(student(images)[0], labels, reduction="none")).mean()
        assert torch.allclose(losses["cross_entropy"], by_hand)
    evaluated = [each.eval().evaluate(images, labels)["loss"] for each in (weighted, plain)]
    assert torch.equal(*evaluated)


def test_labels_is_cross_entropy(student, batch):
    images, labels = batch
    objective = Labels(student)
    assert torch.allclose(objective(images, labels)["loss"], F.cross_entropy(student(images)[0], labels))


def test_label_smoothing_trains_but_does_not_judge(student, batch):
    images, labels = batch
    smooth = Labels(student, label_smoothing=0.3)
    plain = F.cross_entropy(student(images)[0], labels, label_smoothing=0.3)
    assert torch.allclose(smooth(images, labels)["loss"], plain)
    assert torch.equal(smooth.eval().evaluate(images, labels)["loss"], Labels(student).evaluate(images, labels)["loss"])


def test_kl_trains_the_student_alone(student, teacher, batch):
    objective = kl(student, teacher, temperature=4.0)
    objective(*batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.parameters()}
    assert set(objective.state_dict()) == {f"student.{name}" for name in student.state_dict()}


def test_kl_with_labels(student, teacher, batch):
    images, labels = batch
    student.eval()
    losses = kl(student, teacher, temperature=2.0, labels_weight=0.3)(images, labels)
    alone = kl(student, teacher, temperature=2.0)(images, labels)["loss"]
    from_labels = Labels(student)(images, labels)["loss"]
    assert torch.allclose(losses["loss"], 0.7 * alone + 0.3 * from_labels)
    assert torch.allclose(losses["kl"], alone)
    assert torch.allclose(losses["cross_entropy"], from_labels)


@pytest.mark.parametrize("loss", ["kl", "dkd", "dist"])
@pytest.mark.parametrize("standardise", [False, True])
def test_losses_on_logits(student, teacher, batch, loss, standardise):
    """Every sample's as it is evaluated; in training, DIST's correlation over the batch comes on top."""
    images, labels = batch
    objective = kl(student.eval(), teacher, loss=loss, standardise=standardise, temperature=2.0, labels_weight=0.25)
    objective.eval()
    own, target = student(images)[0], teacher.logits(images)
    own, target = (z_scores(logits) for logits in (own, target)) if standardise else (own, target)
    formulas = {
        "kl": lambda: kl_divergence(own, target, 2.0),
        "dkd": lambda: dkd(own, target, labels, 2.0, 1.0, 8.0),
        "dist": lambda: dist_over_classes(own, target, 2.0),
    }
    values = objective.evaluate(images, labels)
    assert torch.allclose(values[loss], formulas[loss]())
    assert torch.allclose(values["loss"], 0.75 * values[loss] + 0.25 * values["cross_entropy"])
    objective.train()
    student.eval()  # batch norms as before
    means = objective(images, labels)
    over_batch = dist_over_batch(own, target, 2.0) if loss == "dist" else 0
    assert torch.allclose(means[loss], formulas[loss]().mean() + over_batch)
    means["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    assert torch.allclose(means["loss"], 0.75 * means[loss] + 0.25 * means["cross_entropy"])


@pytest.mark.parametrize("options", [{"loss": "dkd"}, {"loss": "dist"}, {"standardise": True}], ids=str)
def test_losses_on_stored_logits(student, teacher, batch, options):
    """To half precision: stored logits are shifted, which none of them sees."""
    objective = kl(student.eval(), teacher, temperature=2.0, **options)
    live = objective(*batch)["loss"]
    stored = objective(*batch, compress(teacher.logits(batch[0]), None, 1.0))["loss"]
    assert stored.item() == pytest.approx(live.item(), rel=5e-3)


def test_one_stage_sums_kl_labels_and_blocks(student, teacher, batch):
    images, labels = batch
    student.eval()
    ran = []
    teacher._network.layer(0).register_forward_hook(lambda *_: ran.append(0))
    objective = kl(student, teacher, labels_weight=0.3, blocks_weight=2.0)
    losses = objective(images, labels)
    assert ran == [0]  # one pass gives logits and blocks
    errors = blocks(student, teacher).eval().evaluate(images, labels)["loss"].mean()
    student.requires_grad_(True)
    alone = kl(student, teacher)(images, labels)["loss"]
    assert torch.allclose(losses["mse_blocks"], errors)
    assert torch.allclose(losses["loss"], 0.7 * alone + 0.3 * losses["cross_entropy"] + 2 * errors)
    assert set(objective.evaluate(images, labels)) == {*losses, "top1", "top5"}


def gradients(objective, batch):
    objective.zero_grad()
    losses = objective(*batch)
    losses["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}, losses


def names_of_block(objective, index):
    mine = ("student.conv1.", "student.bn1.", "student.layer1.") if index == 0 else (f"student.layer{index + 1}.",)
    mine += (f"up.{index}.", f"down.{index - 1}.")
    return {name for name, _ in objective.named_parameters() if name.startswith(mine)}


@pytest.fixture(params=[1.0, 0.5], ids=["same channels", "half the channels"])
def thin(request):
    torch.manual_seed(1)
    return build_network({**THIN, "channels": request.param}, 10)


def test_bottom_up_trains_one_block_on_frozen_ones(thin, teacher, batch):
    objective = blocks(thin, teacher)
    ran = []
    for index in range(3):
        thin.layer(index).register_forward_hook(lambda *_, index=index: ran.append(index))
    assert objective.num_phases == 3
    for phase in range(3):
        objective.begin_phase(phase)
        objective.train()
        ran.clear()
        before = {name: value.clone() for name, value in objective.state_dict().items()}
        trained, losses = gradients(objective, batch)
        assert ran == list(range(phase + 1))
        assert set(losses) == {"loss", f"mse_block{phase + 1}"}
        assert set(trained) == names_of_block(objective, phase)
        moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
        statistics = {name for name in before if "running" in name or "tracked" in name}
        parts = tuple({name.rpartition(".")[0] for name in trained})
        assert moved == {name for name in statistics if name.rpartition(".")[0] in parts}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_blocks_are_held_in_autocasts_precision(thin, teacher, batch, dtype):
    """As if they were cast in every step, up to rounding; of the phase before nothing is left."""
    objective = blocks(thin, teacher)
    for index in range(1, 3):
        objective.begin_phase(index)
        objective.train()
        with torch.no_grad():  # what the phase before would have changed
            objective.student.layer(index - 1)[0].conv1.weight.mul_(1.5)
        expected = objective(*batch)["loss"]
        with torch.autocast("cpu", dtype):
            losses = objective(*batch)
        torch.testing.assert_close(losses["loss"], expected, rtol=0.02, atol=0)
        assert {weight.dtype for weight in objective._frozen._network.parameters()} == {dtype}
        losses["loss"].backward()
        trained = {name for name, weight in objective.named_parameters() if weight.grad is not None}
        assert trained >= names_of_block(objective, index)
        assert not trained & names_of_block(objective, index - 1)
        objective.zero_grad()


def test_a_phase_minimises_what_the_evaluation_shows(thin, teacher, batch):
    objective = blocks(thin, teacher).eval()
    for phase in range(3):
        objective.begin_phase(phase)
        error = objective(*batch)["loss"]
        assert torch.allclose(objective.evaluate(*batch)[f"mse_block{phase + 1}"].mean(), error)


def test_a_trained_prefix_learns_from_the_blocks_above(thin, teacher, batch):
    objective = blocks(thin, teacher, prefix="trained")
    objective.begin_phase(1)
    objective.train()
    trained, losses = gradients(objective, batch)
    assert set(trained) == names_of_block(objective, 0) | names_of_block(objective, 1)
    assert set(losses) == {"loss", "mse_block2"}
    frozen = blocks(thin, teacher)
    frozen.begin_phase(1)
    assert set(gradients(frozen.train(), batch)[0]) == names_of_block(frozen, 1)


def test_bottom_up_on_the_teachers_inputs(thin, teacher, batch):
    objective = blocks(thin, teacher, inputs="teacher")
    ran = []
    for index in range(3):
        thin.layer(index).register_forward_hook(lambda *_, index=index: ran.append(index))
    objective.begin_phase(2)
    objective.train()
    trained, losses = gradients(objective, batch)
    assert ran == [2]  # the student's lower blocks are not needed
    assert set(trained) == names_of_block(objective, 2)
    targets = teacher.blocks(batch[0], 3)
    output = objective.up[2](thin.block(2, objective.down[1](targets[1])))
    assert torch.allclose(losses["loss"], block_mse(output, targets[2]).mean(), atol=1e-6)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_jointly_each_block_learns_from_its_own_loss_alone(thin, teacher, batch, inputs):
    """One pass gives the gradients that training each block by itself gives. Eval mode: statistics must not move."""
    objective = blocks(thin, teacher, order="joint", inputs=inputs).eval()
    together, losses = gradients(objective, batch)
    assert objective.num_phases == 1
    assert set(losses) == {"loss", "mse_block1", "mse_block2", "mse_block3"}
    single = blocks(thin, teacher, inputs=inputs).eval()
    single.load_state_dict(objective.state_dict())
    separate = {}
    for phase in range(3):
        single.begin_phase(phase)
        separate |= gradients(single, batch)[0]
    assert together.keys() == separate.keys()
    for name, gradient in together.items():
        assert torch.allclose(gradient, separate[name], rtol=1e-4, atol=1e-7), name


def test_jointly_with_a_trained_prefix_losses_reach_down(thin, teacher, batch):
    objective = blocks(thin, teacher, order="joint").eval()
    separate, _ = gradients(objective, batch)
    objective.trained_prefix = True
    through, _ = gradients(objective, batch)
    assert separate.keys() == through.keys()
    assert not torch.allclose(separate["student.conv1.weight"], through["student.conv1.weight"])
    assert torch.allclose(separate["student.layer3.0.bn3.bias"], through["student.layer3.0.bn3.bias"])


@pytest.mark.parametrize("order", ["joint", "bottom-up"])
def test_blocks_have_weights(thin, teacher, batch, order):
    plain, weighted = (blocks(thin, teacher, order=order, block_weights=w).eval() for w in ([], [1.0, 0.5, 3.0]))
    weighted.load_state_dict(plain.state_dict())
    for phase in range(plain.num_phases):
        for objective in (plain, weighted):
            objective.begin_phase(phase)
        before, _ = gradients(plain, batch)
        after, losses = gradients(weighted, batch)
        parts = {name: loss for name, loss in losses.items() if name != "loss"}
        weights = {"mse_block1": 1.0, "mse_block2": 0.5, "mse_block3": 3.0}
        assert torch.allclose(losses["loss"], sum(weights[name] * loss for name, loss in parts.items()))
        for index, weight in enumerate(weights.values()):
            for name in names_of_block(plain, index) & before.keys():
                assert torch.allclose(after[name], weight * before[name], rtol=1e-3, atol=1e-7), name
    total = weighted.evaluate(*batch)
    assert torch.allclose(total["loss"], total["mse_block1"] + 0.5 * total["mse_block2"] + 3 * total["mse_block3"])


def test_imitation_never_runs_the_teacher_above_the_block(student, batch):
    teacher = Teacher(build_network({**THIN, "width": 4}, 10))
    ran = []
    for index in range(3):
        teacher._network.layer(index).register_forward_hook(lambda *_, index=index: ran.append(index))
    objective = blocks(student, teacher)
    objective.begin_phase(1)
    objective.train()(*batch)
    assert ran == [0, 1]


def test_the_classifier_is_the_teachers_or_fresh(student, teacher, batch):
    fresh = student.fc.weight.clone()
    assert torch.equal(blocks(student, teacher, classifier="fresh").finished().fc.weight, fresh)
    finished = blocks(student, teacher).finished()
    assert torch.equal(finished.fc.weight, teacher.copy_of_head()[-1].weight)
    assert torch.equal(finished.fc.bias, teacher.copy_of_head()[-1].bias)


OTHERS = {
    "mobile": {"arch": "mobilenet_v2", "channels": 0.1, "stem": "small"},
    "pre-activation": {**THIN, "stem_channels": 4, "pre_activation": True},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_walked_and_merged_too(family, batch):
    """Each phase trains its block with the transforms around it; what is left behind answers as what was evaluated."""
    channels = {"mobile": 0.35, "pre-activation": 2}[family]
    teacher = Teacher(build_network({**OTHERS[family], "width": 2, "channels": channels}, 10))
    student = build_network(OTHERS[family], 10)
    objective = blocks(student, teacher)
    trained = set()
    for phase in range(student.num_blocks):
        objective.begin_phase(phase)
        objective.train().zero_grad()
        objective(*batch)["loss"].backward()
        learns = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
        around = {f"up.{phase}.weight", f"down.{phase - 1}.weight"} & {*dict(objective.named_parameters())}
        assert around < learns and not learns & trained
        assert all(float(objective.get_parameter(name).grad.abs().max()) > 0 for name in learns)
        trained |= learns
    head = {f"student.{name}" for name in ("fc.weight", "fc.bias")}
    if family == "mobile":
        last = "student.features.18"
        head = {f"{last}.{name}" for name in ("0.weight", "1.weight", "1.bias")}
        head |= {f"student.classifier.1.{name}" for name in ("weight", "bias")}
    own = {name for name, _ in objective.named_parameters() if name.startswith("student.")}
    assert {name for name in trained if name.startswith("student.")} == own - head
    _, logits = objective.eval().losses(*batch)
    finished = objective.finished()
    assert finished.state_dict().keys() == student.state_dict().keys()
    assert torch.allclose(finished(batch[0])[0], logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(student.eval()(batch[0])[0], logits, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, {"classifier": "fresh"}])
def test_what_is_evaluated_is_what_is_left_behind(thin, teacher, batch, options):
    objective = blocks(thin, teacher, **options).eval()
    _, logits = objective.losses(*batch)
    finished = objective.finished()
    assert finished.state_dict().keys() == thin.state_dict().keys()
    assert torch.allclose(finished(batch[0])[0], logits, rtol=1e-3, atol=1e-4)
