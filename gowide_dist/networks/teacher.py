"""A trained network as a teacher: in eval mode, without gradients, its batch norms folded into its convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from gowide_dist.networks.folding import fold_batch_norms
from gowide_dist.networks.network import Network

Output = TypeVar("Output")


class Teacher:
    """A network in eval mode and without gradients. No nn.Module, so that it is in no student and no checkpoint.

    Its batch norms are folded, which changes its outputs by rounding alone. dtype: that autocast computes in, to which
    it would else cast the weights of a network without gradients anew in every step.
    """

    def __init__(self, network: Network, *, compiled: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.block_channels = network.block_channels
        self.normalise = network.normalise
        self._head = network.head_layers
        self._network = fold_batch_norms(network).requires_grad_(False)
        for module in self._network.modules():
            if type(module) in (nn.Conv2d, nn.Linear):  # norms that are left need float32 statistics
                module.to(dtype)
        if compiled:
            self._network.compile_blocks()
        self._cache: dict[tuple[int, int | str], tuple[Tensor, Any]] | None = None
        self._own: Tensor | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, H] -> logits [B, K]."""
        return self._cached(images, "logits", lambda own: cast(Tensor, self._network(own)[0]))

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images [B, 3, H, H] -> logits [B, K] and outputs [B, C_i, H_i, H_i] of all blocks, from one pass."""
        return self._cached(images, "outputs", self._network.outputs)

    @torch.no_grad()
    def blocks(self, images: Tensor, num_blocks: int) -> tuple[Tensor, ...]:
        """Images [B, 3, H, H] -> outputs [B, C_i, H_i, H_i] of the first `num_blocks` blocks; the others do not run."""
        return self._cached(images, num_blocks, lambda own: self._network.blocks(own, num_blocks))

    @contextmanager
    def cached(self, own: Tensor | None = None) -> Iterator[None]:
        """Within this context, outputs are cached per tensor of images (the object, not its values).

        Students that train together so share one forward pass of the teacher. own: the batch in the teacher's
        normalisation, which it looks at in place of what it is asked about, the same batch in a student's.
        """
        self._cache, self._own = {}, own
        try:
            yield
        finally:
            self._cache = self._own = None

    def _cached(self, images: Tensor, what: int | str, compute: Callable[[Tensor], Output]) -> Output:
        images = images if self._own is None else self._own
        if self._cache is None:
            return compute(images)
        key = id(images), what
        if key not in self._cache:
            self._cache[key] = images, compute(images)  # holds the images too: no other tensor can get their id
        return cast(Output, self._cache[key][1])

    def copy_of_head(self) -> list[nn.Module]:
        """The layers behind the last block, their batch norms not folded; the classifier is the last."""
        return [copy.deepcopy(layer).requires_grad_(False) for layer in self._head]
