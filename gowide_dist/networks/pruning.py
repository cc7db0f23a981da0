"""A start from the teacher: weights that fit, and of what is too wide inside the units the strongest channels.

Inner channels are those between the convolutions of a unit, where networks that differ in `width` differ. A channel's
importance is |scale of its norm| times the norm of the weights that read it: the scale alone, as in network slimming
(Liu et al. 2017, arXiv 1708.06519), means little where the next convolution ignores the channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gowide_dist.networks.network import InnerLayer, Network


@torch.no_grad()
def take_over(student: Network, teacher: Network) -> None:
    """Copy every weight and statistic of the teacher that has the same name and shape into the student.

    Where networks differ in `width` alone these are the stem, the shortcuts, the last norm of every unit and the
    classifier: all but the convolutions inside the units and the norms between them.
    """
    _copy_what_fits(student.state_dict(), teacher.state_dict())


@torch.no_grad()
def take_over_strongest(student: Network, teacher: Network) -> None:
    """`take_over`, and for the inner channels of every unit the teacher's most important ones, in their order.

    Units are matched by name; those that the teacher lacks stay as they are. A student as wide as its teacher becomes
    the teacher. Both have the same kind of unit, pass on the same channels, and no unit of the student has more inner
    channels.
    """
    take_over(student, teacher)
    wide_units = dict(teacher.named_modules())
    for name, unit in student.named_modules():
        if name in wide_units:
            _take_strongest(unit, wide_units[name], getattr(unit, "inner_layers", ()))


def _take_strongest(unit: nn.Module, wide: nn.Module, inner_layers: Sequence[InnerLayer]) -> None:
    """The same channels in the rows that write them, their norms, and the columns that read them."""
    if not inner_layers:
        return
    state = {name: value for name, value in wide.state_dict().items() if value.ndim}
    for rows, norm, reader in inner_layers:
        weight = f"{reader}.weight"  # [C_out, C, kernel, kernel]
        count = unit.get_parameter(weight).shape[1]
        kept = _strongest(wide.get_parameter(f"{norm}.weight"), wide.get_parameter(weight), count)
        for name in state:
            if name.rpartition(".")[0] in rows:
                state[name] = state[name][kept]
        state[weight] = state[weight][:, kept]
    _copy_what_fits(unit.state_dict(), state)


def _strongest(scale: Tensor, readers: Tensor, count: int) -> Tensor:
    """Indices of the `count` most important channels, ascending. scale: [C], readers: [C_out, C, kernel, kernel]."""
    importance: Tensor = scale.abs() * torch.linalg.vector_norm(readers, dim=(0, 2, 3))
    return importance.argsort(descending=True, stable=True)[:count].cpu().sort()[0]


def _copy_what_fits(to: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, value in to.items():
        if value.ndim and name in weights and weights[name].shape == value.shape:  # batch norms' counters are scalars
            value.copy_(weights[name])
