"""What all networks have in common: blocks that are walked one by one, and a head that makes logits of the last output.

Shapes: B images, C channels, H = W pixels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from gowide_dist.networks.architecture import Structure
from gowide_dist.networks.foreign import Foreign, normalise_of
from gowide_dist.networks.normalise import Normalise


class InnerLayer(NamedTuple):
    """Channels inside a unit, where networks that differ in `width` differ; names are relative to the unit."""

    rows: tuple[str, ...]  # modules whose weights and statistics have a row for each channel
    norm: str  # the one of them that scales what is read
    reader: str  # the convolution that reads the channels


class Network(nn.Module, ABC):
    """Images [B, 3, H, H] -> logits [B, K] and the output of every block [B, C_i, H_i, H_i].

    It can also be walked block by block: `block(0)`, which begins with the stem, to `block(num_blocks - 1)`, `head`.
    """

    classifier_name: ClassVar[str]  # before the names of the classifier's weights

    architecture: Structure
    merges = True  # whether linear maps between its blocks can be multiplied into it

    def __init__(self, architecture: Structure | Foreign, num_classes: int) -> None:
        super().__init__()
        self.architecture = architecture  # type: ignore[assignment]  # `Wrapped` has another's
        self.num_classes = num_classes
        self.is_compiled = False
        self.preprocessing: Any = None  # data.preprocessing.Preprocessing, of a network that `load_model` gives
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    @property
    def num_blocks(self) -> int:
        return self.architecture.num_blocks

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of each block's output."""
        return self.architecture.block_channels

    @property
    def normalise(self) -> Normalise:
        return normalise_of(self.architecture)

    @property
    def plain(self) -> nn.Module:
        """The module whose weights are saved, under the names that the world knows."""
        return self

    @abstractmethod
    def block_modules(self, index: int) -> list[nn.Module]:
        """The modules of block `index` that have parameters or statistics; the first block begins with the stem."""

    @abstractmethod
    def block(self, index: int, x: Tensor) -> Tensor:
        """One block: [B, C_(i-1), H, H], or images [B, 3, H, H] for block 0 -> [B, C_i, H_i, H_i]."""

    @abstractmethod
    def readers(self, index: int) -> list[nn.Module]:
        """The convolutions that read the input of block `index`, which is not 0: all that see it."""

    def compiled_modules(self, index: int) -> list[nn.Module]:
        """The modules of block `index` that torch.compile takes, each as a whole."""
        return self.block_modules(index)

    @property
    @abstractmethod
    def head_layers(self) -> list[nn.Module]:
        """The layers behind the last block; the last of them, the classifier, reads the pooled output of the others."""

    def blocks(self, images: Tensor, num_blocks: int | None = None) -> tuple[Tensor, ...]:
        """Outputs [B, C_i, H_i, H_i] of all blocks, or of the first `num_blocks` without running the others."""
        outputs = [images]
        for index in range(self.num_blocks if num_blocks is None else num_blocks):
            outputs.append(self.block(index, outputs[-1]))
        return tuple(outputs[1:])

    def pool(self, x: Tensor) -> Tensor:
        """Global average pooling: [B, C, H, H] -> [B, C]."""
        if torch.compiler.is_exporting():
            return x.mean((2, 3))  # else a branch on the strides of its input would be left in the graph
        if x.is_contiguous(memory_format=torch.channels_last):
            # The same sums, but their gradient stays in channels_last; that of AdaptiveAvgPool2d does not, which slows
            # the layers below.
            return x.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)
        return cast(Tensor, self.avgpool(x).flatten(1))

    def head(self, x: Tensor, layers: Sequence[nn.Module] | None = None) -> Tensor:
        """Output [B, C, H, H] of the last block -> logits [B, K]. layers: another network's, in place of its own."""
        *convolutions, classifier = self.head_layers if layers is None else layers
        for layer in convolutions:
            x = layer(x)
        return cast(Tensor, classifier(self.pool(x)))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        blocks = self.blocks(images)
        return self.head(blocks[-1]), blocks

    def outputs(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits and the outputs of all blocks, from one pass."""
        return cast(tuple[Tensor, tuple[Tensor, ...]], self(images))

    def settle(self, side: int) -> None:
        """Find out on square images of `side` px what another's network does not say of itself."""

    def freeze_unused(self, side: int) -> None:
        """Freeze parameters on which the logits do not depend; ours have none."""

    def compile_blocks(self) -> None:
        """Compile each block in place; names and values of the weights stay."""
        self.is_compiled = True
        for index in range(self.num_blocks):
            for module in self.compiled_modules(index):
                # By default all share one limit of 8 compiled versions: torch.compile wraps the same code of each.
                module.compile(isolate_recompiles=True, recompile_limit=32)
