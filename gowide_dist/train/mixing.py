"""Mixup and CutMix: images of a batch mixed in pairs, before student and teacher see them.

Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899). Rows 2k and 2k + 1 of the global batch are a
pair, in which each takes the other as its partner: whole pairs lie in one process, whatever the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gowide_dist.data.order import MIXING_STREAM, draw, epoch_key
from gowide_dist.timeline import Batching
from gowide_dist.train.losses import MixedLabels
from gowide_dist.world import to_device


@dataclass(frozen=True)
class Pairs:
    """How P pairs of images of `side` px are mixed: an image keeps the part `outside` of each pixel outside of a box,
    and nothing inside of it. CutMix has an outside of 1, mixup an empty box.
    """

    outside: NDArray[np.float64]  # [P]
    box: NDArray[np.int64]  # [4, P]: top, bottom, left, right; px
    side: int

    @property
    def lam(self) -> NDArray[np.float64]:
        """The part that an image keeps of itself, and so of its label: [2 P], one for each image."""
        top, bottom, left, right = self.box
        return np.repeat(self.outside * (1 - (bottom - top) * (right - left) / self.side**2), 2)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, MixedLabels]:
        """Images [2 P, 3, H, H] in channels_last, which are overwritten, and labels [2 P]: both mixed."""

        def on_device(values: NDArray[np.float64] | NDArray[np.int64]) -> Tensor:
            return to_device(torch.from_numpy(values), images.device)

        top, bottom, left, right = on_device(self.box)[:, :, None]
        place = torch.arange(self.side, device=images.device)
        in_rows, in_columns = (top <= place) & (place < bottom), (left <= place) & (place < right)  # [P, H] each
        inside = in_rows[:, :, None] & in_columns.repeat_interleave(3, dim=1)[:, None]  # [P, H, 3 H]
        partners_part = torch.where(inside, 1.0, 1 - on_device(self.outside).float()[:, None, None])
        # by rows of pixels, as in `TrainData.normalised`
        pairs = images.permute(0, 2, 3, 1).view(-1, 2, self.side, 3 * self.side)
        pairs.lerp_(pairs.flip(1), partners_part[:, None])
        return images, MixedLabels(labels, labels.view(-1, 2).flip(1).flatten(), on_device(self.lam).float())

    def seen(self, samples: Tensor) -> Tensor:
        """What the stream's digest counts in place of samples: a hash of each, its partner and its part. [2 P] int64"""
        own = samples.numpy().astype(np.uint64)
        hashes = draw(draw(own, own.reshape(-1, 2)[:, ::-1].reshape(-1)), self.lam.view(np.uint64))
        return torch.from_numpy(hashes.view(np.int64))


@dataclass(frozen=True)
class Mixing:
    """Mixing of a stage. mixup, cutmix: alphas of the Beta distributions, 0: off. seed: of the data."""

    mixup: float
    cutmix: float
    seed: int

    def pairs(self, step: int, side: int, batching: Batching) -> Pairs:
        """This process's pairs of a step. Every process draws those of the global batch, in about 0.1 ms.

        Draws are RandomState's, which NumPy never changes (NEP 19).
        """
        random = np.random.RandomState(np.array([epoch_key(self.seed, step, MIXING_STREAM)]).view(np.uint32))
        num_pairs = batching.global_batch // 2
        has_box = random.random_sample(num_pairs) < (0.5 if self.mixup and self.cutmix else bool(self.cutmix))
        lam, box_lam = (
            random.beta(alpha, alpha, num_pairs) if alpha else np.ones(num_pairs) for alpha in (self.mixup, self.cutmix)
        )
        # A centre may lie at the border, which then cuts the box, as in the paper.
        centre = (random.random_sample((2, num_pairs)) * side).astype(np.int64)
        half = np.where(has_box, np.sqrt(1 - box_lam) * side / 2, 0).astype(np.int64)
        box = np.stack([centre - half, centre + half], axis=1).reshape(4, num_pairs).clip(0, side)
        rows = batching.local_rows(0)
        own = slice(rows.start // 2, rows.stop // 2)
        return Pairs(np.where(has_box, 1.0, lam)[own], box[:, own], side)
