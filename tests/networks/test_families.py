"""Families of timm and torchvision: built, costed, and a real step of each as a teacher and as a student, on the meta
device, where tensors have shapes and no values. Or refused, with the reason.
"""

import pytest

from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.foreign import Timm, Torchvision
from gowide_dist.stages import KlStage, LabelsStage
from gowide_dist.train.costs import _count, network_cost

OPTIM = {"lr": 0.1}
LABELS = LabelsStage.model_validate({"train": "a", "objective": "labels", "epochs": 1, "optim": OPTIM})
KL = KlStage.model_validate({"train": "a", "objective": "kl", "teacher": "b", "epochs": 1, "optim": OPTIM})
THIN = Architecture.model_validate({"block": "basic", "depths": [1], "base": 8})
# Shallow, where the function that builds it has an argument for that.
TIMM = [
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("convnext_atto", 32, {"depths": [1, 1, 1, 1]}),
    ("convnextv2_atto", 32, {"depths": [1, 1, 1, 1]}),
    ("regnety_002", 32, {}),
    ("test_efficientnet", 32, {}),
    ("mobilenetv3_small_050", 32, {}),
    ("mobilenetv4_conv_small_035", 32, {}),
    ("densenet121", 32, {"block_config": [2, 2, 2, 2]}),
    ("swin_tiny_patch4_window7_224", 32, {"img_size": 32, "window_size": 2, "depths": [1, 1, 1, 1]}),
    ("resnet10t", 32, {}),
    ("resnetv2_50", 32, {"layers": [1, 1, 1, 1]}),
    ("res2net50_26w_4s", 32, {"layers": [1, 1, 1, 1]}),
    ("ghostnet_050", 32, {}),
    ("lcnet_050", 32, {}),
    ("mixer_s32_224", 32, {"img_size": 32}),
    ("xcit_nano_12_p8_224", 32, {"depth": 2}),
    ("levit_128s", 64, {"img_size": 64}),
    ("repvgg_a0", 32, {}),
    ("dla46_c", 32, {}),
]
TORCHVISION = [
    ("vit_b_32", 32, {"image_size": 32}),
    ("convnext_tiny", 32, {}),
    ("regnet_y_400mf", 32, {}),
    ("efficientnet_b0", 32, {}),
    ("mobilenet_v3_small", 32, {}),
    ("mnasnet0_5", 32, {}),
    ("swin_t", 32, {}),
    ("shufflenet_v2_x0_5", 32, {}),
    ("vgg11", 32, {}),
    ("squeezenet1_1", 32, {}),
]


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        *((Timm.model_validate({"timm": name, **options}), side) for name, side, options in TIMM),
        *((Torchvision.model_validate({"torchvision": name, **options}), side) for name, side, options in TORCHVISION),
    ],
    ids=str,
)
def test_a_family(settings, side):
    cost = network_cost(settings, 10, side)
    assert cost.parameters > 5e4 and cost.macs > 1e5
    teaches = _count(KL, THIN, settings, 10, side, 2)
    assert teaches.macs.teacher == pytest.approx(cost.macs, rel=0.02)
    learns = _count(LABELS, settings, None, 10, side, 2)
    assert learns.macs.backward > 1.5 * cost.macs
    assert 0 < learns.trained <= cost.parameters


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Timm.model_validate({"timm": "vit_tiny_patch16_224"}), "Input height"),
        (Torchvision.model_validate({"torchvision": "inception_v3"}), "Kernel size"),
        (Timm.model_validate({"timm": "inception_v4"}), "Kernel size"),
    ],
    ids=str,
)
def test_one_that_cannot_is_refused_with_the_reason(settings, reason):
    with pytest.raises(RecipeError, match=f"cannot take images of 32 px: .*{reason}"):
        _count(LABELS, settings, None, 10, 32, 2)


def test_auxiliary_heads_are_not_trained():
    settings = Torchvision.model_validate({"torchvision": "googlenet"})
    whole, trained = network_cost(settings, 10, 64).parameters, _count(LABELS, settings, None, 10, 64, 2).trained
    assert whole - trained > 4e6  # two heads
