"""A pruned start: a thin network takes over a wide one's weights and, inside its units, the strongest channels.

Inner channels are those between the convolutions of a unit, where networks that differ in `width` differ. A channel's
importance is |scale of its norm| times the norm of the weights that read it: the scale alone, as in network slimming
(Liu et al. 2017, arXiv 1708.06519), means little where the next convolution ignores the channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gowide_dist.networks.resnet import BasicUnit, BottleneckUnit, ResNet, take_over


@torch.no_grad()
def take_over_strongest(student: ResNet, teacher: ResNet) -> None:
    """`take_over`, and for the inner channels of every unit the teacher's most important ones, in their order.

    Units are matched by name; those that the teacher lacks stay as they are. A student as wide as its teacher becomes
    the teacher. Both have the same kind of unit, and no unit of the student has more inner channels.
    """
    take_over(student, teacher)
    wide_units = dict(teacher.named_modules())
    for name, unit in student.named_modules():
        if isinstance(unit, BasicUnit | BottleneckUnit) and name in wide_units:
            _take_strongest(unit, wide_units[name])


def _take_strongest(unit: nn.Module, wide: nn.Module) -> None:
    """The same channels in the rows that write them, their norm, and the columns that read them."""
    numbers = (1, 2, 3) if isinstance(unit, BottleneckUnit) else (1, 2)
    inputs = torch.arange(wide.get_parameter("conv1.weight").shape[1])
    for number in numbers:
        weight = wide.get_parameter(f"conv{number}.weight")  # [C_out, C_in, kernel, kernel]
        outputs = torch.arange(len(weight))
        if number < numbers[-1]:
            count = len(unit.get_parameter(f"conv{number}.weight"))
            readers = wide.get_parameter(f"conv{number + 1}.weight")
            outputs = _strongest(wide.get_parameter(f"bn{number}.weight"), readers, count)
        _copy_if_fits(unit.get_parameter(f"conv{number}.weight"), weight[outputs][:, inputs])
        norm, wide_norm = (each.get_submodule(f"bn{number}").state_dict() for each in (unit, wide))
        for name in ("weight", "bias", "running_mean", "running_var"):
            _copy_if_fits(norm[name], wide_norm[name][outputs])
        inputs = outputs


def _strongest(scale: Tensor, readers: Tensor, count: int) -> Tensor:
    """Indices of the `count` most important channels, ascending. scale: [C], readers: [C_out, C, kernel, kernel]."""
    importance: Tensor = scale.abs() * torch.linalg.vector_norm(readers, dim=(0, 2, 3))
    return importance.argsort(descending=True, stable=True)[:count].cpu().sort()[0]


def _copy_if_fits(to: Tensor, values: Tensor) -> None:
    if to.shape == values.shape:  # not where what the units pass on differs
        to.copy_(values)
