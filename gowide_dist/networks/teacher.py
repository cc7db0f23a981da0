"""Networks that only answer: a teacher in eval mode, its batch norms folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gowide_dist.networks.resnet import ResNet


class Teacher:
    """A trained network that only answers: in eval mode, without gradient, part of no module and of no checkpoint.

    Its batch norms are folded into its convolutions, which changes its answers by rounding alone.
    """

    def __init__(self, network: ResNet, *, compiled: bool = False) -> None:
        self.block_channels = network.architecture.block_channels
        self._network = fold_batch_norms(network).requires_grad_(False)
        if compiled:
            self._network.compile_blocks()
        self._given: list[tuple[Tensor, int | str, object]] | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, K] for images [B, 3, H, H]."""
        return self._answer(images, "logits", lambda: cast(Tensor, self._network(images)[0]))

    @torch.no_grad()
    def blocks(self, images: Tensor, num_blocks: int) -> tuple[Tensor, ...]:
        """Outputs of the first `num_blocks` blocks; those above are not run."""
        return self._answer(images, num_blocks, lambda: self._network.blocks(images, num_blocks))

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Inside, the same question about the same tensor of images gets the same answer again, without computing it.

        For students that train together: the first one's forward pass asks, the others' hear.
        """
        self._given = []
        try:
            yield
        finally:
            self._given = None

    def _answer(self, images: Tensor, question: int | str, compute: Callable[[], Answer]) -> Answer:
        if self._given is None:
            return compute()
        for about, asked, answer in self._given:
            if about is images and asked == question:
                return cast(Answer, answer)
        self._given.append((images, question, compute()))
        return cast(Answer, self._given[-1][2])

    def copy_of_classifier(self) -> nn.Linear:
        """The teacher's classifier, apart from the teacher."""
        return copy.deepcopy(self._network.fc)


def fold_batch_norms(network: ResNet) -> ResNet:
    """A copy in eval mode without batch norms, whose convolutions scale and shift in their place."""
    network = copy.deepcopy(network).eval()
    for module in [network, *network.modules()]:
        names = [("0", "1")] if isinstance(module, nn.Sequential) else [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        for conv_name, norm_name in names:
            conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network


Answer = TypeVar("Answer")
