"""A rehearsal of device placement without a GPU: training steps on PyTorch's meta device.

An operation on the meta device raises if one of its tensors was left on the CPU, and so does asking for a scalar.
"""

import pytest
import torch

from gowide_dist.networks.build import build_network
from gowide_dist.networks.teacher import Teacher
from gowide_dist.stages import BlocksStage, KlStage, LabelsStage, Optim
from gowide_dist.train import optim
from gowide_dist.train.context import COMPUTE_DTYPES, TrainBatch
from gowide_dist.train.losses import MixedLabels
from gowide_dist.train.objectives import build_objective
from gowide_dist.train.optim import MovingAverage, Optimizer
from gowide_dist.train.teacher_logits import TeacherOutput
from tests.train.test_optim import OPTIM

BASIC = {"block": "basic", "depths": [1, 2], "base": 8, "stem": "small"}
BOTTLENECK = {"block": "bottleneck", "depths": [2, 1], "base": 8, "stem": "imagenet", "zero_init_residual": True}
STAGES = {
    "labels": (LabelsStage, {"label_smoothing": 0.1}),
    "balanced labels": (LabelsStage, {"class_weights": "balanced"}),
    "balanced kl": (KlStage, {"class_weights": "balanced", "labels_weight": 0.3}),
    "mixed labels": (LabelsStage, {"mixup": 0.2, "cutmix": 1.0}),
    "mixed kl": (KlStage, {"temperature": 4.0, "labels_weight": 0.3, "cutmix": 1.0}),
    "kl": (KlStage, {"temperature": 4.0, "labels_weight": 0.3}),
    "standardised": (KlStage, {"standardise": True}),
    "terms": (KlStage, {"labels_weight": 0.3, "blocks_weight": 1.0}),
    "dist": (KlStage, {"loss": "dist", "temperature": 2.0}),
    "dkd": (KlStage, {"loss": "dkd", "labels_weight": 0.5}),
    "stored": (KlStage, {"temperature": 4.0, "teacher_logits": "stored", "top_k": 3}),
    "bottom-up": (BlocksStage, {}),
    "prefix": (BlocksStage, {"prefix": "trained"}),
    "inputs": (BlocksStage, {"inputs": "teacher"}),
    "weighted": (BlocksStage, {"block_weights": [1.0, 0.5]}),
    "joint": (BlocksStage, {"order": "joint", "classifier": "fresh"}),
}


def stage_of(name):
    model, options = STAGES[name]
    taught = {} if model is LabelsStage else {"teacher": "teacher"}
    objective = {LabelsStage: "labels", KlStage: "kl", BlocksStage: "blocks"}[model]
    common = {"train": ["thin"], "objective": objective, "epochs": 1, "optim": OPTIM}
    return model.model_validate({**common, **taught, **options})


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("channels", [1.0, 0.5], ids=["", "transforms"])
@pytest.mark.parametrize("family", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def test_a_step_leaves_no_tensor_behind_and_asks_for_no_scalar(monkeypatch, family, channels, name):
    # no fused step on the meta device, whose devices PyTorch lists
    monkeypatch.setattr(optim, "SGD", lambda groups, fused, **options: torch.optim.SGD(groups, **options))
    with torch.device("meta"):
        same = {"channels": channels} if name == "terms" else {}  # no transforms there
        teacher_network = build_network({**family, "width": 4.0, **same}, 10)
        student = build_network({**family, "channels": channels}, 10)
    teacher = None if name == "stored" else Teacher(teacher_network)
    with torch.device("meta"):  # as `ctx.place` puts a network on the device before its objective is built
        weights = torch.empty(10) if "balanced" in name else None
        objective = build_objective(stage_of(name), student, teacher, weights)
    assert {parameter.device.type for parameter in objective.parameters()} == {"meta"}
    images = torch.empty(8, 3, 32, 32, device="meta").to(memory_format=torch.channels_last)
    labels = torch.zeros(8, dtype=torch.long, device="meta")
    stored = TeacherOutput(
        torch.empty(8, 4, dtype=torch.half, device="meta"), torch.empty(8, 3, dtype=torch.int, device="meta")
    )
    batch = TrainBatch(images, labels, stored if name == "stored" else None)
    lam = torch.empty(8, device="meta")
    targets = MixedLabels(labels, labels, lam) if "mixed" in name else labels
    average = MovingAverage(objective)
    for phase in range(objective.num_phases):
        objective.begin_phase(phase)
        optimizer = Optimizer(objective, Optim(lr=0.1, momentum=0.9, clip_norm=1.0), scaled=False)
        objective.train()
        for part in batch._replace(labels=targets).chunk(2):
            losses = objective(*part)
            optimizer.backward(losses["loss"] / 2)
        optimizer.step(0.1)
        average.update(0.9)
    objective.eval()
    with torch.inference_mode(), average.applied():
        values = objective.evaluate(*batch)
    assert {value.device.type for value in values.values()} == {"meta"}
    assert {tensor.device.type for tensor in objective.finished().state_dict().values()} == {"meta"}


@pytest.mark.parametrize("precision", COMPUTE_DTYPES)
def test_a_frozen_teacher_answers_alike_in_the_precision_that_it_is_held_in(precision):
    """Autocast would cast its weights in every step: once is the same."""
    torch.manual_seed(0)
    dtype = COMPUTE_DTYPES[precision]
    network = build_network({**BOTTLENECK, "zero_init_residual": False}, 10).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        cast_each_time, cast_once = (Teacher(network, dtype=d).logits(images) for d in (torch.float32, dtype))
    assert torch.equal(cast_each_time, cast_once)
    assert Teacher(network, dtype=dtype).copy_of_head()[-1].weight.dtype == torch.float32
